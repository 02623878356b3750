"""`alignez-gguf export`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignez_gguf.cli import options
from alignez_gguf.errors import SteeringError

if TYPE_CHECKING:
    from alignez_gguf.pipeline import Export


@click.command()
@options.model
@options.queries
@options.column
@options.output
@click.option(
    "--recipe",
    type=click.Choice(["auto", "paper"]),
    default="auto",
    show_default=True,
    help="auto chooses without labels; paper is AlignEZ to the letter.",
)
@click.option("--method", type=click.Choice(["ccs", "mean", "svd-diff"]), help="Only this one; default: all.")
@click.option(
    "--read", "reading", type=click.Choice(["prompt", "response"]), help="Only this reading position."
)
@click.option("--layers", help="Only these may be edited, as 4-20, 4- or 3,5,8.")
@click.option(
    "--threshold", type=options.FiniteRange(0, 1), default=0.5, show_default=True, help="For --recipe paper."
)
@click.option(
    "--kl-budget",
    type=options.FiniteRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="How far answers may move from the base model's, in nat per token.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=200, show_default=True, help="Of an answer.")
@options.work_dir
@options.templates
@options.seed
@options.engine
@options.quiet
def export(
    model: Path,
    queries: str,
    column: str | None,
    output: Path,
    work_dir: Path | None,
    templates: Path | None,
    layers: str | None,
    quiet: bool,
    threads: int | None,
    gpu_layers: int,
    parallel: int,
    context: int | None,
    **settings: Any,
) -> None:
    """Make the control file of MODEL, a GGUF file, from unlabelled queries.

    The model answers each query as a helpful and as a harmful persona; small probes find in each layer what
    tells the answers apart; the file makes llama.cpp remove it, or add its opposite, while it generates.

    \b
    Example:
      alignez-gguf export model-Q4_K_M.gguf -q default -o safe.gguf
    """
    from alignez_gguf.atomic import require_writable
    from alignez_gguf.cli.reporting import reporter
    from alignez_gguf.pipeline import Settings
    from alignez_gguf.pipeline import export as run
    from alignez_gguf.prompts import METADATA_KEY
    from alignez_gguf.queries import load_queries
    from alignez_gguf.runtime import library
    from alignez_gguf.workdir import WorkDirectory

    asked = load_queries(queries, column)
    require_writable(output)
    if settings["recipe"] == "auto":
        library.require_patched()
    say = reporter(quiet)
    with (
        options.resumable(output, work_dir) as place,
        options.open_engine(model, threads, gpu_layers, parallel, context) as engine,
    ):
        chosen_layers = parse_layers(layers, engine.info.n_layer)
        framing = options.resolve_templates(templates, engine.model.metadata(METADATA_KEY))
        with WorkDirectory(place) as work:
            made = run(engine, asked, framing, Settings(layers=chosen_layers, **settings), work, say)
            made.control.save(output)
    if not quiet:
        _print_choice(made)
    click.echo(output)


def parse_layers(text: str | None, n_layer: int) -> tuple[int, ...] | None:
    """Layers from "4-20", "4-" or "3,5,8". Raises `SteeringError` where the model has no such layer."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or not (last.isdecimal() or (dash and not last) or not dash):
            raise SteeringError(f"the layers {text!r} are not understood; write them as 4-20, 4- or 3,5,8")
        start = int(first)
        end = int(last) if last else n_layer - 1 if dash else start
        if not start <= end < n_layer:
            raise SteeringError(f"the layers {text!r} are not all in the model, which has 0 to {n_layer - 1}")
        layers.update(range(start, end + 1))
    return tuple(sorted(layers))


def _print_choice(made: Export) -> None:
    from rich.console import Console
    from rich.table import Table

    from alignez_gguf.selection import span

    console = Console(stderr=True)
    if made.selection is None:
        decisions = [edit.decision for edit in made.control.edits.values()]
        counts = ", ".join(f"{decisions.count(kind)} {kind}" for kind in dict.fromkeys(decisions))
        console.print(f"edited layers: {len(decisions)} of {made.control.model.n_layer} ({counts})")
        return
    selection = made.selection
    table = Table(
        "",
        "edit",
        "layers",
        "gain, nat",
        "KL, nat/token",
        "net, nat",
        title=f"label-free choice over {selection.n_queries} queries: the best edits within "
        f"{selection.budget:g} nat per token",
    )
    for scored in selection.affordable[:_SHOWN]:
        table.add_row(
            "->" if scored == selection.chosen else "",
            str(scored.candidate),
            span(scored.candidate.layers),
            f"{scored.gain:+.3f} +- {scored.standard_error:.3f}",
            f"{scored.kl:.3f}",
            f"{scored.net:+.3f}",
        )
    console.print(table)
    console.print(
        f"{len(selection.tried)} edits tried; all of them are in the file (alignez-gguf inspect --json)"
    )


_SHOWN = 8
"""Rows of the table on the terminal."""
