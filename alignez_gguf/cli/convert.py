"""`alignez-gguf convert`: a control file in a form that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignez_gguf.cli import options
from alignez_gguf.exporters import FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alignez_gguf.exporters import Written
    from alignez_gguf.exporters.merged import MergedWeight


@click.command()
@click.argument("control", type=click.Path(path_type=Path, dir_okay=False))
@options.model
@click.option("--format", "form", type=click.Choice(FORMATS), required=True, help="See below.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The file to write; a stem for stock, a folder for peft.",
)
@click.option(
    "--strength",
    type=options.FiniteRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Strength of the edit that --format merged writes into the weights.",
)
@click.option(
    "--tolerance",
    type=options.FiniteRange(0, min_open=True),
    default=0.02,
    show_default=True,
    help="Relative error beyond which --format merged gives a weight a wider type than it had.",
)
@options.quiet
def convert(
    control: Path, model: Path, form: str, output: Path, strength: float, tolerance: float, quiet: bool
) -> None:
    """Write a CONTROL file, and the MODEL that it is for, in a form that other programs load.

    \b
    stock   OUTPUT.lora.gguf and OUTPUT.cvec.gguf, for any llama.cpp (--lora, --control-vector)
    merged  a model with the edits in its weights: no adapter, and the speed of the original
    peft    a LoRA for the transformers model of the same weights, which vLLM loads as well
    glp     "GGUF Layer Projection", for ds4 and other readers of that format
    native  the control file itself, checked against the model

    What a form cannot carry is an error that says so: it is never left out.

    \b
    Example:
      alignez-gguf convert safe.gguf model-Q4_K_M.gguf --format stock -o safe
      llama-server -m model-Q4_K_M.gguf --lora safe.lora.gguf
    """
    from alignez_gguf import exporters
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.control.control_file import ControlFile

    written = exporters.write(
        form,  # type: ignore[arg-type]
        ControlFile.load(control),
        model,
        output,
        strength=strength,
        tolerance=tolerance,
        progress=reporter(quiet),
    )
    show(written, quiet=quiet)


def show(written: Written, *, quiet: bool) -> None:
    """Name the files on stdout, one a line; say on stderr how they are used, and what merging did."""
    for path in written.paths:
        click.echo(path)
    if quiet:
        return
    if written.merged:
        _print_merged(written.merged)
    for note in written.notes:
        click.echo(f"note: {note}", err=True)
    if written.how_to:
        click.echo(f"use it as: {written.how_to}", err=True)


def _print_merged(weights: Sequence[MergedWeight]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("weight", "type", "rounding error", "of what was removed is back")
    for weight in weights:
        kind = weight.type if weight.type == weight.type_before else f"{weight.type_before} -> {weight.type}"
        table.add_row(weight.name, kind, f"{weight.error:.2%}", f"{weight.came_back:.2%}")
    Console(stderr=True).print(table)
