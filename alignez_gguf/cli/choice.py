"""The tables that `export` prints: what was chosen, next to what else could be, and to the baselines."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from alignez_gguf.control.layer_ranges import span

if TYPE_CHECKING:
    from alignez_gguf.pipeline import Export, RecipeResult
    from alignez_gguf.selection.search import Selection


def print_choice(made: Export, file: IO[str]) -> None:
    """Tell how the edits of a finished job came about."""
    console = Console(file=file)
    for one in made.results:
        if one.selection is None:
            decisions = [edit.decision for edit in one.edits.values()]
            counts = ", ".join(f"{decisions.count(kind)} {kind}" for kind in dict.fromkeys(decisions))
            n_layer = made.control.model.n_layer
            console.print(f"edited layers: {len(decisions)} of {n_layer} ({counts})")
        else:
            console.print(_choice(one, one.selection))
            console.print(
                f"{len(one.selection.tried)} edits tried; all of them are in the file (alignez-gguf inspect "
                "--json). With --work-dir kept, --choose N takes another row."
            )
        if one.confirmation is not None:
            console.print(str(one.confirmation))
    if made.tradeoffs:
        table = Table("aspect", "weight", "gain alone", "gain together", "KL together", title="aspects")
        for one_aspect in made.tradeoffs:
            table.add_row(
                one_aspect.aspect.name,
                f"{one_aspect.aspect.weight:g}",
                f"{one_aspect.alone.gain:+.3f}",
                f"{one_aspect.together.gain:+.3f}",
                _number(one_aspect.together.kl),
            )
        console.print(table)


def _choice(made: RecipeResult, selection: Selection) -> Table:
    """The Pareto front of gain against KL, and the baselines of the confirmation."""
    table = Table(
        "",
        "edit",
        "layers",
        "gain, nat",
        "KL, nat/token",
        title=f"label-free choice over {selection.n_queries} queries, budget {selection.budget:g} nat/token",
    )
    front, chosen = selection.pareto, selection.chosen
    rows = [(f"-> {row}" if one == chosen else str(row), one) for row, one in enumerate(front, start=1)]
    for number, scored in rows if chosen in front else [*rows, ("->", chosen)]:
        score = scored.score
        table.add_row(
            number,
            str(scored.candidate),
            span(scored.candidate.layers),
            f"{score.gain:+.3f} +- {score.standard_error:.3f}",
            _number(score.kl),
        )
    table.add_section()
    for baseline in made.confirmation.baselines if made.confirmation else ():
        gain = f"{baseline.score.gain:+.3f} +- {baseline.score.standard_error:.3f}"
        table.add_row("", baseline.name, "", gain, _number(baseline.score.kl))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
