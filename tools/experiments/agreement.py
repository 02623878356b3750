"""How far the patch and the stock form are from numpy and from each other, at every quantization level.

Part of `quantization_sweep.py --agreement`. Every layer loses the direction of its mean MLP output, which
changes much, and `alignez_gguf.verification.verify` judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Agreement:
    """One level; shares of what the edit changes, of the middle token.

    Attributes:
        level: of quantization.
        types: in which the file keeps its down projections.
        patched_error, stock_error: of the worst layer, edited alone, to numpy.
        rounding: what rounding alone changes of the logits.
        difference: of the logits, patched to stock.
        holds: whether the stock form does.
        note: why there is no figure, or why it does not hold.
    """

    level: str
    types: tuple[str, ...] = ()
    patched_error: float | None = None
    stock_error: float | None = None
    rounding: float | None = None
    difference: float | None = None
    holds: bool | None = None
    note: str = ""


def agreements(
    model: Path, levels: Sequence[str], folder: Path, n_threads: int | None
) -> Iterator[Agreement]:
    """The model as it is given to each level in turn; a file of a level is removed after it was judged."""
    from alignez_gguf.errors import AlignezError
    from alignez_gguf.runtime.quantize import quantize_file

    for level in levels:
        path = folder / f"{model.stem}-{level}.gguf"
        try:
            quantize_file(model, path, level, n_threads=n_threads or 0)
            yield _judged(level, path, n_threads)
        except AlignezError as error:
            yield Agreement(level, note=str(error))
        finally:
            path.unlink(missing_ok=True)


def _judged(level: str, path: Path, n_threads: int | None) -> Agreement:
    from alignez_gguf.control.control_file import ControlFile, ModelInfo
    from alignez_gguf.control.edits import LayerEdit
    from alignez_gguf.exporters.weights import ModelWeights
    from alignez_gguf.verification.session import VerificationSession
    from alignez_gguf.verification.verify import PROMPT, verify

    with VerificationSession(path, PROMPT, n_prompt=16, n_answer=1, n_threads=n_threads) as session:
        _, seen = session.observe()
    # not of the first token, whose hidden states are like no other's
    edits = {layer: LayerEdit(remove=outputs[1:].mean(0)) for layer, outputs in sorted(seen.mlp.items())}
    found = verify(path, ControlFile(ModelInfo.from_gguf(path), edits), n_threads=n_threads)
    weights = ModelWeights(path)
    types = {down.weight.type.name for layer in edits for down in weights.down_projections(layer)}
    return Agreement(
        level,
        tuple(sorted(types)),
        max((check.error for check in found.layers if check.error is not None), default=None),
        max((check.stock_error for check in found.layers if check.stock_error is not None), default=None),
        found.floor,
        found.patched_stock_share,
        found.stock_holds,
        found.reason or found.patched_stock_note,
    )


def print_table(found: Sequence[Agreement], width: int | None) -> None:
    """The figures; notes below."""
    from rich.console import Console
    from rich.table import Table

    table = Table("level", "down projections", title="patched and stock, as shares of what an edit changes")
    for header in (
        "a layer, patched",
        "a layer, stock",
        "logits, rounding",
        "logits, patched to stock",
        "holds",
    ):
        table.add_column(header, justify="right")
    for one in found:
        figures = (one.patched_error, one.stock_error, one.rounding, one.difference)
        table.add_row(
            one.level,
            ", ".join(one.types),
            *("-" if figure is None else f"{figure:.1e}" for figure in figures),
            {True: "yes", False: "no", None: "-"}[one.holds],
        )
    Console(width=width).print(table)
    for one in found:
        if one.note:
            print(f"{one.level}: {one.note}")
