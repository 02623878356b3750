"""`alignez-gguf generate`: prompts in, JSONL out."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from alignez_gguf.cli import options
from alignez_gguf.errors import QueryError

if TYPE_CHECKING:
    from alignez_gguf.cli.completion_store import CompletionStore
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.engines.base import GenerationRequest, Sampling
    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.prompts.chat_template import FramingChoice
    from alignez_gguf.prompts.tables import Record

_DECISION = "steered"
"""The field of a row that says whether the gate of the control opened for it."""


@click.command()
@options.model
@options.control
@click.option("-p", "--prompt", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "--prompts",
    help="A .txt (a line each), .csv, .tsv, .json, .jsonl or .parquet file (field `prompt`), - for standard "
    "input (lines or JSONL), or a set that -q of `export` knows by name.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The JSONL file to write; default: standard output.",
)
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat framing.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Maximum tokens per completion.",
)
@click.option(
    "--temperature", type=options.FiniteRange(0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-p", type=options.FiniteRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--stop", multiple=True, help="A string that ends a completion; may be repeated.")
@click.option(
    "--n", "n_samples", type=click.IntRange(1), default=1, show_default=True, help="Completions per prompt."
)
@options.strength
@options.scope
@click.option("--compare", is_flag=True, help="Add the field `base`: what the unsteered model says.")
@options.work_dir
@options.templates
@options.framing
@options.seed
@options.engine
@options.quiet
def generate(
    model: Path,
    control: Path | None,
    prompt: tuple[str, ...],
    prompts: str | None,
    output: Path | None,
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop: tuple[str, ...],
    n_samples: int,
    strength: float,
    scope: str | None,
    compare: bool,
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
    """Complete many prompts with MODEL, steered by a control file if one is given.

    The prompts are taken as they are unless --chat is given. A row of the output has the fields of the input
    and `completion`; with --n above 1 a prompt has several rows, numbered by `sample`; where the control
    file has a gate, `steered` says whether it opened. An input that has a field which would be written is
    refused. With -o, an interrupted run goes on where it stopped when the
    same command is given again.

    \b
    Examples:
      alignez-gguf generate model-Q4_K_M.gguf -c safe.gguf --chat -p "How do I pick a lock?"
      alignez-gguf generate model-Q4_K_M.gguf -c safe.gguf --prompts prompts.jsonl --compare -o answers.jsonl
    """
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.control.edits import check_strength
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.engines.base import GenerationRequest, Sampling
    from alignez_gguf.prompts.chat_template import ChatTemplate, other_framing
    from alignez_gguf.storage.atomic import require_writable, write_text

    if bool(prompt) == bool(prompts):
        raise click.UsageError("give prompts with either -p or --prompts")
    if "" in stop:
        raise click.BadParameter("a stop string must not be empty", param_hint="--stop")
    if compare and control is None:
        raise click.UsageError("--compare needs a control file; give it with -c FILE")
    strengths = {"base": 0.0} if compare else {}
    strengths["completion"] = strength if control else 0.0
    counted = ["sample"] if n_samples > 1 else []
    given = (
        [{"prompt": text} for text in prompt] if prompt else _read_rows(str(prompts), [*counted, *strengths])
    )
    rows: list[dict[str, Any]] = [
        row | dict.fromkeys(counted, sample) for row in given for sample in range(n_samples)
    ]
    if output is not None:
        require_writable(output)
    check_strength(strength)
    chosen_scope = None if scope is None else Scope.parse(scope)
    # Weights are laid out for as many texts as may grow at once, and a single one is slower for it.
    parallel = min(parallel, len(rows) * len(strengths))
    with ExitStack() as opened:
        place = None if output is None else opened.enter_context(options.resumable(output, work_dir))
        engine = opened.enter_context(options.open_engine(model, threads, gpu_layers, parallel, context))
        steered = steer_engine(engine, control, chosen_scope)
        is_gated = steered is not None and steered.gate is not None
        if is_gated:
            _require_free(rows, _DECISION)
        asking = ChatTemplate.of(engine.model, templates, framing) if chat else None
        if asking and steered and (warning := other_framing(steered.framing, asking.templates.framing)):
            reporter(quiet).note(warning)
        sampling = Sampling(max_tokens, temperature, top_p, (*stop, *(asking.stop if asking else ())))
        requests = [
            GenerationRequest(
                asking.prompt([], row["prompt"]) if asking else row["prompt"], seed + index, one_strength
            )
            for index, row in enumerate(rows)
            for one_strength in strengths.values()
        ]
        with (
            _store(place, engine, control, chosen_scope, requests, sampling) as done,
            reporter(quiet).stage("generating", len(requests)) as advance,
        ):
            advance(len(done.found))
            missing = [index for index in range(len(requests)) if index not in done.found]
            for index, completion in engine.generate([requests[index] for index in missing], sampling):
                done.add(missing[index], completion)
                advance(1)
        completions = iter([done.found[index] for index in range(len(requests))])
        for row in rows:
            found = {name: next(completions) for name in strengths}
            row |= {name: completion.text for name, completion in found.items()}
            if is_gated:
                row[_DECISION] = found["completion"].steered
        # Parquet has dates and other values that JSON has not; they become text.
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        if output is None:
            click.echo("".join(lines).encode("utf-8", errors="replace"), nl=False)
        else:
            write_text(output, "".join(lines))
            click.echo(output)


@contextmanager
def _store(
    place: Path | None,
    engine: LlamaEngine,
    control: Path | None,
    scope: Scope | None,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
) -> Iterator[CompletionStore]:
    """What an earlier run of the job has done, and a place for the rest; a passing one without `place`."""
    from alignez_gguf.cli.completion_store import CompletionStore
    from alignez_gguf.storage.workdir import WorkDirectory

    with ExitStack() as opened:
        folder = Path(opened.enter_context(TemporaryDirectory())) if place is None else place
        work = opened.enter_context(WorkDirectory(folder))
        path = work.part(
            "completions",
            model=engine.info.fingerprint,
            control=None if control is None else sha256(control.read_bytes()).hexdigest(),
            scope=str(scope),
            requests=[asdict(request) for request in requests],
            sampling=asdict(sampling),
        )
        yield opened.enter_context(CompletionStore(path.with_suffix(".jsonl")))


def steer_engine(engine: LlamaEngine, control: Path | None, scope: Scope | None) -> ControlFile | None:
    """Set the edits of a control file, if there is one, on the engine of the model that it was made for.

    Without a scope, the one that the file was chosen for.
    """
    if control is None:
        return None
    from alignez_gguf.control.control_file import ControlFile

    loaded = ControlFile.load(control)
    loaded.check_fits(engine.info)
    engine.set_edits(loaded.edits, scope or loaded.scope, loaded.gate)
    return loaded


def _read_rows(source: str, written: Collection[str]) -> list[dict[str, Any]]:
    """Rows with a `prompt`; those of a table keep their other fields, none of which may be `written` here."""
    from alignez_gguf.prompts import datasets, tables
    from alignez_gguf.prompts.queries import read_queries, read_table

    if datasets.is_named(source):
        return [{"prompt": query} for query, _ in read_queries(source)]
    table = read_table(source)
    if not table.has_columns:
        rows = [{"prompt": record.fields[tables.LINE]} for record in table.rows]
    else:
        rows = [_row(record, written) for record in table.rows]
    if not rows:
        raise QueryError(f"{source} holds no prompts; write at least one")
    return rows


def _require_free(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise `QueryError` where a row has a field of this name already."""
    if any(name in row for row in rows):
        raise QueryError(
            f"a row has a field `{name}`, which would be overwritten by what the gate of the control "
            "decides; rename it in the input"
        )


def _row(record: Record, written: Collection[str]) -> dict[str, Any]:
    if not isinstance(record.fields.get("prompt"), str):
        raise QueryError(f"{record.where} has no string `prompt`; give every row that field")
    for name in written:
        if name in record.fields:
            raise QueryError(
                f"{record.where} has a field `{name}`, which would be overwritten by what is generated; "
                "rename it in the input"
            )
    return dict(record.fields)
