"""`alignez-gguf pairs`: only the self-generated pairs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignez_gguf.cli import options

if TYPE_CHECKING:
    from alignez_gguf.prompts.chat_template import FramingChoice


@click.command()
@options.model
@options.queries
@options.column
@options.output
@click.option(
    "--max-tokens", type=click.IntRange(1), default=48, show_default=True, help="Maximum tokens per answer."
)
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Pairs for each query.")
@options.work_dir
@options.templates
@options.framing
@options.seed
@options.engine
@options.quiet
def pairs(
    model: Path,
    queries: str,
    column: str | None,
    output: Path,
    max_tokens: int,
    samples: int,
    work_dir: Path | None,
    templates: Path | None,
    framing: FramingChoice,
    seed: int,
    quiet: bool,
    threads: int | None,
    gpu_layers: int,
    parallel: int,
    context: int | None,
) -> None:
    """Let MODEL write its preference pairs, as JSONL: a helpful and a harmful answer to each query.

    \b
    Example:
      alignez-gguf pairs model-Q4_K_M.gguf -q queries.txt -o pairs.jsonl
    """
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.pipeline import Job, Settings, self_generated_pairs
    from alignez_gguf.prompts.chat_template import templates_of
    from alignez_gguf.prompts.queries import load_queries
    from alignez_gguf.prompts.templates import SAFETY
    from alignez_gguf.storage.atomic import require_writable, write_text
    from alignez_gguf.storage.workdir import WorkDirectory

    asked = load_queries(queries, column)
    require_writable(output)
    with options.resumable(output, work_dir) as place:
        with options.open_engine(model, threads, gpu_layers, parallel, context) as engine:
            asking = templates_of(engine.model, templates, framing).for_aspect(SAFETY)
            settings = Settings(seed=seed, max_tokens=max_tokens, samples=samples)
            with WorkDirectory(place) as work:
                # As `export` asks, which so finds the pairs in the same work directory.
                job = Job(engine, asking, settings, work, reporter(quiet), engine, engine)
                made = self_generated_pairs(job, asked)
        write_text(output, "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in made))
    click.echo(output)
