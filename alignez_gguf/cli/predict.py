"""`alignez-gguf predict`: is this model worth the main job?"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignez_gguf.cli import options
from alignez_gguf.readout import HOOKS

if TYPE_CHECKING:
    from alignez_gguf.pipeline import EditScoringEngine
    from alignez_gguf.predict import Prediction, Separability
    from alignez_gguf.prompts.chat_template import FramingChoice, HasMetadata


@click.command()
@click.argument("model")
@options.queries
@options.column
@click.option(
    "--limit", type=click.IntRange(10), help="Maximum number of queries; they are drawn with --seed."
)
@click.option(
    "--embedder",
    help="Compare with a sentence embedder: an embedding model as .gguf, or a name that "
    "sentence-transformers knows.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Skip the score of the best edit on held-out queries; needs no patched runtime.",
)
@click.option(
    "--read",
    "reading",
    type=click.Choice(["response", "response-mean"]),
    default="response",
    show_default=True,
    help="Read answers at their last token, or as the mean over their tokens.",
)
@click.option(
    "--hook",
    type=click.Choice(HOOKS),
    default="mlp",
    show_default=True,
    help="Which hidden state of a layer is read.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=48, show_default=True, help="Maximum tokens per answer."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory that caches finished work, for this command after an interruption and for export "
    "(default: MODEL.predict.work in this folder, removed at the end).",
)
@options.templates
@options.framing
@options.seed
@options.engine
@options.quiet
def predict(
    model: str,
    queries: str,
    column: str | None,
    limit: int | None,
    embedder: str | None,
    quick: bool,
    as_json: bool,
    work_dir: Path | None,
    templates: Path | None,
    framing: FramingChoice,
    seed: int,
    quiet: bool,
    threads: int | None,
    gpu_layers: int,
    parallel: int,
    context: int | None,
    **settings: Any,
) -> None:
    """Predict whether MODEL can align itself, before anyone spends an hour on it.

    MODEL is first asked whether its personas differ at all, which takes a minute. Then it writes pairs of
    answers as it does for export, and a logistic regression tries to tell the helpful from the harmful ones,
    on queries that it has not seen: by the model's embeddings, layer by layer, and by the length and the
    first word alone. A quick search scores the best edit on held-out queries. Exits 0 whatever the verdict.

    \b
    Examples:
      alignez-gguf predict model-Q4_K_M.gguf -q default
      alignez-gguf predict model-Q4_K_M.gguf -q default --limit 40 --quick --json
    """
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.pipeline import Job, Settings
    from alignez_gguf.predict import predict as run
    from alignez_gguf.prompts.chat_template import templates_of
    from alignez_gguf.prompts.queries import load_queries
    from alignez_gguf.runtime import bindings
    from alignez_gguf.storage.workdir import WorkDirectory

    asked = _limited(load_queries(queries, column), limit, seed)
    if not quick:
        bindings.require_patched()
    with ExitStack() as opened:
        place = opened.enter_context(options.resumable(Path(f"{Path(model).name}.predict"), work_dir))
        engine, described = _engine(opened, model, (threads, gpu_layers, parallel, context))
        asking = templates_of(described, templates, framing)
        work = opened.enter_context(WorkDirectory(place))
        job = Job(engine, asking, Settings(seed=seed, **settings), work, reporter(quiet), engine, engine)
        found = run(job, asked, embed=_embed(embedder, threads, gpu_layers), quick=quick)
    if as_json:
        import json

        click.echo(json.dumps(found.document(), ensure_ascii=False))
    else:
        _print(found)


def _limited(queries: list[str], limit: int | None, seed: int) -> list[str]:
    """`limit` of the queries, in their order."""
    if limit is None or limit >= len(queries):
        return queries
    import random

    return [queries[index] for index in sorted(random.Random(seed).sample(range(len(queries)), limit))]


def _engine(
    opened: ExitStack, model: str, how: tuple[int | None, int, int, int | None]
) -> tuple[EditScoringEngine, HasMetadata | None]:
    """Open the engine, and the model that says how it is asked."""
    source = options.gguf_file(model)
    if source is not None:
        engine = opened.enter_context(options.open_engine(source, *how))
        return engine, engine.model
    from alignez_gguf.engines.transformers.engine import TransformersEngine

    return opened.enter_context(TransformersEngine(model, n_ctx=how[3])), None


def _embed(name: str | None, threads: int | None, gpu_layers: int) -> Any:
    """Turns pairs into features by the embedder of that name, if one is named."""
    if name is None:
        return None
    from alignez_gguf.predict import embed_pairs, open_embedder

    embedder = open_embedder(name, n_threads=threads, n_gpu_layers=gpu_layers)
    return lambda pairs, advance: embed_pairs(embedder, pairs, advance)


def _print(found: Prediction) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if found.pairs.total:
        console.print(str(found.pairs))
    if found.own is not None and found.surface is not None:
        table = Table(
            "told apart by",
            "accuracy",
            "chance",
            "p",
            "p (cues)",
            "adjusted",
            title="answers to unseen queries, mean and deviation of 5 runs",
        )
        own = found.own
        for layer, figures in enumerate(zip(own.accuracy, own.deviation, strict=True)):
            if layer == own.best:
                table.add_row(f"layer {layer} (the best)", *_row(own))
            else:
                table.add_row(f"layer {layer}", _figure(*figures))
        table.add_section()
        table.add_row("length and first word", *_row(found.surface))
        if found.embedder is not None:
            table.add_row("the embedder", *_row(found.embedder))
        console.print(table)
    if found.unfiltered is not None and found.pairs.kept < found.pairs.total:
        console.print(f"the best layer on all pairs, those of no use too: {found.unfiltered:.3f}")
    if found.held_out is not None and found.held_out.edit is not None:
        console.print(f"the best edit of a quick search: {found.held_out.edit}")
    click.echo(str(found.verdict))


def _row(found: Separability) -> list[str]:
    return [
        _figure(found.best_accuracy, found.deviation[found.best]),
        f"{found.chance:.3f}",
        f"{found.p_chance:.3f}",
        "-" if found.p_surface is None else f"{found.p_surface:.3f}",
        f"{found.adjusted:.2f}",
    ]


def _figure(accuracy: float, deviation: float) -> str:
    return f"{accuracy:.3f} +- {deviation:.3f}"
