"""Arguments and options that several commands share."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from alignez_gguf.engines.base import DEFAULT_N_PARALLEL

if TYPE_CHECKING:
    from alignez_gguf.engines.llama.engine import LlamaEngine

Command = TypeVar("Command", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """A number in a range. A plain `FloatRange` lets infinity and NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


FILE = click.Path(path_type=Path, dir_okay=False)

model = click.argument("model", type=FILE)
control = click.option("-c", "--control", type=FILE, help="The control file that steers the model.")
strength = click.option(
    "--strength",
    type=float,
    default=1.0,
    show_default=True,
    help="How much of the edit is applied; 0 is off.",
)
scope = click.option(
    "--scope",
    help="Which tokens are steered: generation, all, or first:N (default: those that the control file was "
    "chosen for, else generation).",
)
QUERIES_HELP = (
    "A .txt (a line each), .csv, .tsv, .json, .jsonl or .parquet file, - for standard input (lines or "
    "JSONL), a shipped set (default, demo), or a published one: jailbreakbench, just-eval-redteam, "
    "malicious-instruct, hh-redteam, advbench, xstest."
)
queries = click.option("-q", "--queries", required=True, help=QUERIES_HELP)
column = click.option("--column", help="The column or field of a table that holds the query.")
output = click.option("-o", "--output", type=FILE, required=True, help="The file to write.")
seed = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed."
)
quiet = click.option("--quiet", is_flag=True, help="No progress on stderr.")
framing = click.option(
    "--framing",
    type=click.Choice(["auto", "chat", "transcript"]),
    default="auto",
    show_default=True,
    help="Ask through the model's chat template or in a transcript. auto: chat, where there is a chat "
    "template and neither you nor the model bring other templates.",
)
templates = click.option(
    "--templates",
    type=FILE,
    help="A TOML file with prompt templates; else the model's own, else the shipped ones.",
)


def _use_servers(context: click.Context, parameter: click.Parameter, endpoints: str | None) -> None:
    if endpoints is not None:
        from alignez_gguf.runtime.rpc import use_servers

        use_servers(endpoints)


rpc = click.option(
    "--rpc",
    metavar="HOST:PORT,...",
    callback=_use_servers,
    expose_value=False,
    help="Spread the model over these ggml-rpc-servers. Unencrypted: for networks that you trust.",
)
work_dir = click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory that caches finished work, so that the same command goes on after an interruption "
    "(default: OUTPUT.work, removed at the end).",
)


def engine(command: Command) -> Command:
    """How the model is run."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(1), help="CPU threads; default: the number of physical cores."
        ),
        click.option(
            "--gpu-layers", type=int, default=-1, show_default=True, help="Layers on the GPU; -1 is all."
        ),
        click.option(
            "--parallel",
            type=click.IntRange(1, 256),
            default=DEFAULT_N_PARALLEL,
            show_default=True,
            help="Sequences decoded in parallel; fewer if they are long.",
        ),
        click.option(
            "--context", type=click.IntRange(16), help="Context length in tokens, prompt and answer together."
        ),
        rpc,
    ):
        command = option(command)
    return command


def open_engine(
    path: Path,
    threads: int | None,
    gpu_layers: int,
    parallel: int,
    context: int | None,
    *,
    exact: bool = True,
) -> LlamaEngine:
    """The engine that the options of `engine` describe; one text at a time is faster if not `exact`."""
    from alignez_gguf.runtime import bindings

    bindings.is_patched()  # raises where there is no llama.cpp at all, before the engine imports it
    from alignez_gguf.engines.llama.engine import LlamaEngine

    return LlamaEngine(
        path,
        n_ctx=context,
        n_parallel=parallel,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        exact=exact,
    )


def gguf_file(model: str) -> Path | None:
    """The file that MODEL names; `None` where it is a folder or a hub id for transformers.

    A hub id stays the text that it is: as a path, `./org/name` would lose its first two characters.
    """
    path = Path(model)
    return path if path.suffix.lower() == ".gguf" or path.is_file() else None


@contextmanager
def resumable(output: Path, work_dir: Path | None) -> Iterator[Path]:
    """Where a job keeps what is done: `work_dir`, or a place beside `output` that goes when it succeeds."""
    place = work_dir or output.with_name(f"{output.name}.work")
    try:
        yield place
    except KeyboardInterrupt:
        raise click.ClickException(f"stopped; the same command goes on from {place}") from None
    if work_dir is None:
        shutil.rmtree(place, ignore_errors=True)
