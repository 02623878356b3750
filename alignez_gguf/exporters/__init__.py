"""The same edits in the forms that other programs load: one file per form, and one way in."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from alignez_gguf.errors import SteeringError

if TYPE_CHECKING:
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.exporters.merged import MergedWeight
    from alignez_gguf.progress import Reporter

Format = Literal["native", "stock", "glp", "merged", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Written:
    """The files of an export, and how to use them.

    Attributes:
        paths: the files, in the order in which they are to be named.
        how_to: the command line that uses them; empty where there is none to say.
        notes: what a user has to know of the form, a line each.
        merged: what became of each weight; for `merged` only.
    """

    paths: tuple[Path, ...]
    how_to: str = ""
    notes: tuple[str, ...] = ()
    merged: tuple[MergedWeight, ...] = ()


def write(
    form: Format,
    control: ControlFile,
    model_path: Path,
    output: Path,
    *,
    strength: float = 1.0,
    tolerance: float | None = None,
    progress: Reporter | None = None,
) -> Written:
    """Write a control in a form that other programs load.

    Args:
        form: `native` (our own), `stock` (a LoRA and a control vector for any llama.cpp), `glp` (readers of
            that format), `merged` (a model of its own), or `peft` (transformers, vLLM).
        control: the edits.
        model_path: the GGUF file that they are for; of a split model, its first part.
        output: the file; a stem for `stock`, a folder for `peft`.
        strength: for `merged` only: how much of the edits goes into the weights.
        tolerance: for `merged` only: see `merged.write`.

    Raises:
        ControlFileError: the control is for another model, or cannot be written.
        SteeringError: the form cannot carry an edit; the message says which, and how to fix it.
        ModelFileError: the model cannot be read.
        OutputError: a file cannot be written; nothing half-written is left.
    """
    from alignez_gguf.exporters import glp, merged, peft, stock
    from alignez_gguf.exporters.weights import ModelWeights

    weights = ModelWeights(model_path)
    control.check_fits(weights.info)
    if control.gate is not None and form != "native":
        raise SteeringError(
            f"the control steers only requests for which its gate opens, and {form} files steer every one; "
            "export with --gate off for other programs"
        )
    if form == "native":
        control.save(output)
        return Written((output,), shlex.join(["alignez-gguf", "chat", str(model_path), "-c", str(output)]))
    notes = _notes_on_scope(control)
    if form == "stock":
        paths = stock.write(control, weights, output, progress)
        if len(paths) > 1:
            notes += ('the scale of a request\'s own "lora" changes the removal alone, not the addition',)
        return Written(tuple(paths), stock.command_line(model_path, paths), notes)
    if form == "glp":
        return Written(tuple(glp.write(control, output)), notes=notes)
    if form == "peft":
        return Written(tuple(peft.write(control, weights, output, progress)), notes=notes)
    report = merged.write(
        control,
        weights,
        output,
        strength=strength,
        tolerance=merged.DEFAULT_TOLERANCE if tolerance is None else tolerance,
        progress=progress,
    )
    return Written((output,), shlex.join(["llama-server", "-m", str(output)]), notes, tuple(report))


def _notes_on_scope(control: ControlFile) -> tuple[str, ...]:
    """Every form but our own edits every token.

    Raises:
        SteeringError: the control was chosen to edit the beginning of an answer only.
    """
    scope = str(control.recipe.get("scope", "all"))
    if scope.startswith("first:"):
        raise SteeringError(
            f"the control was chosen to edit {scope} tokens of an answer, and this form edits all tokens; "
            "export with --scope all, or use the native form"
        )
    if scope == "all":
        return ()
    return ("it edits every token, the prompt's too; the native form leaves the prompt as it is",)
