"""The whole job on every model of models.txt whose weights are on this machine, and what it does to refusals.

    python3 tools/experiments/run_models.py [--dir DIR] [--only NAME]... [--held-out SET] [--out DIR] [--json]

Sets up `.venv` first. For each base model: `alignez-gguf export`, then `alignez-gguf generate` with and
without the control file on requests that the export never saw; for each aligned version only the latter,
for comparison. Downloads nothing: weights are looked for in DIR and in the Hugging Face cache. Refusals are
counted by the package's offline detector, so they are a hint and no verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment

if TYPE_CHECKING:
    from known_models import KnownModel

    from alignez_gguf.prompts.datasets import DatasetRow

MAX_TOKENS = 128
HELD_OUT = 40
"""Queries at the end of the default set that are held out unless another set is named."""


@dataclass(frozen=True)
class Refusals:
    """Shares of refused requests, between 0 and 1; None where there was no such request."""

    harmful: float | None
    harmless: float | None


@dataclass(frozen=True)
class Outcome:
    """What became of one model; `note` says why a part is missing."""

    model: str
    weights: str | None = None
    base: Refusals | None = None
    steered: Refusals | None = None
    score: float | None = None
    kl: float | None = None
    seconds: float | None = None
    note: str = ""


class CommandError(Exception):
    """A command of the package failed; it has said why."""


def main(arguments: Sequence[str]) -> int:
    """Run every model; return 1 if a command failed, else 0."""
    options = _parse(arguments)
    from known_models import known_models

    from alignez_gguf.errors import AlignezError

    models = known_models(options.models)
    unknown = set(options.only) - {model.name for model in models}
    if unknown:
        sys.exit(f"Error: no model is named {', '.join(sorted(unknown))}; see models.txt")
    try:
        held_out = _held_out(options.held_out)
        fit = _write_fit_queries(options.queries, held_out, options.out)
    except AlignezError as error:
        sys.exit(f"Error: {error}")
    chosen = [model for model in models if not options.only or model.name in options.only]
    outcomes = [_run(model, options, fit, held_out) for model in chosen]
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)
    else:
        _print_table(outcomes, held_out)
    return int(any(outcome.weights and outcome.note for outcome in outcomes))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    root = setup_environment.ROOT
    parser = argparse.ArgumentParser(description="Run the whole job on the models whose weights are at hand.")
    parser.add_argument(
        "--dir", type=Path, help="where GGUF files are; the Hugging Face cache is searched too"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this model; repeatable")
    parser.add_argument("--queries", default="default", help="for the export (default: default)")
    parser.add_argument(
        "--held-out",
        metavar="SET",
        help="requests with labels, as xstest or xstest=FILE (default: the end of the default set)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=root / "build" / "models",
        help="control files and answers (default: build/models)",
    )
    parser.add_argument("--models", type=Path, help="another file like models.txt")
    parser.add_argument("--seed", type=int, default=0, help="of the export (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON list; the rest goes to stderr")
    return parser.parse_args(arguments)


def _held_out(source: str | None) -> list[DatasetRow]:
    from alignez_gguf.prompts.datasets import DatasetRow, load_dataset_rows
    from alignez_gguf.prompts.queries import load_queries

    if source is not None:
        return load_dataset_rows(source)
    # The default set is made of twins: a harmful request, then a harmless one in like words.
    return [DatasetRow(query, n % 2 == 0) for n, query in enumerate(load_queries("default")[-HELD_OUT:])]


def _write_fit_queries(source: str, held_out: Sequence[DatasetRow], folder: Path) -> Path:
    from alignez_gguf.prompts.queries import load_queries

    unseen = {row.query for row in held_out}
    queries = [{"query": query} for query in load_queries(source) if query not in unseen]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fit.jsonl"
    path.write_text("".join(json.dumps(query) + "\n" for query in queries), encoding="utf-8")
    return path


def _run(
    model: KnownModel, options: argparse.Namespace, fit: Path, held_out: Sequence[DatasetRow]
) -> Outcome:
    weights = _weights(model, options.dir)
    if weights is None:
        return Outcome(model.name, note=f"skipped: no {model.gguf_file} ({model.gguf_repository})")
    mismatch = _mismatch(model, weights)
    if mismatch:
        return Outcome(model.name, str(weights), note=f"skipped: {mismatch}")
    started = time.monotonic()
    text_out = sys.stderr if options.json else sys.stdout
    folder = options.out / model.name
    folder.mkdir(parents=True, exist_ok=True)
    control = folder / "control.gguf"
    export = ["export", str(weights), "-q", str(fit), "-o", str(control), "--seed", str(options.seed)]
    base = steered = None
    score: dict[str, float] = {}
    try:
        base = _refusals(weights, [], held_out, folder / "base.jsonl", text_out)
        if model.base is not None:
            _alignez([*export, "--work-dir", str(folder / "work")], text_out)
            score = _score(control)
            steered = _refusals(weights, ["-c", str(control)], held_out, folder / "steered.jsonl", text_out)
        note = ""
    except CommandError as error:
        note = str(error)
    seconds = round(time.monotonic() - started, 1)
    return Outcome(
        model.name, str(weights), base, steered, score.get("score"), score.get("kl"), seconds, note
    )


def _weights(model: KnownModel, folder: Path | None) -> Path | None:
    """The file in `folder`, at any depth, or in the Hugging Face cache."""
    found = sorted(folder.rglob(model.gguf_file)) if folder is not None else []
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    repository = cache / f"models--{model.gguf_repository.replace('/', '--')}"
    found += sorted(repository.glob(f"snapshots/*/{model.gguf_file}"))
    return next((path for path in found if path.is_file()), None)


def _mismatch(model: KnownModel, weights: Path) -> str:
    """How a file differs from its line of models.txt; empty if it does not."""
    from alignez_gguf.control.model_info import ModelInfo
    from alignez_gguf.errors import AlignezError

    try:
        info = ModelInfo.from_gguf(weights)
    except AlignezError as error:
        return str(error)
    shape = (info.arch, info.n_layer, info.n_embd)
    expected = (model.architecture, model.layers, model.width)
    return "" if shape == expected else f"{weights} is {shape}, and models.txt says {expected}"


def _refusals(
    weights: Path, steering: Sequence[str], held_out: Sequence[DatasetRow], answers: Path, text_out: TextIO
) -> Refusals:
    from alignez_gguf.text.refusal import is_refusal

    prompts = answers.with_name("prompts.jsonl")
    rows = [{"prompt": row.query, "harmful": row.harmful} for row in held_out]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["generate", str(weights), *steering, "--prompts", str(prompts), "--chat", "-o", str(answers)]
    _alignez([*command, "--max-tokens", str(MAX_TOKENS)], text_out)
    refused: dict[bool | None, list[bool]] = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        refused.setdefault(row["harmful"], []).append(is_refusal(row["completion"], row["prompt"]))
    return Refusals(*(_mean(refused.get(harmful, [])) for harmful in (True, False)))


def _mean(refused: Sequence[bool]) -> float | None:
    return sum(refused) / len(refused) if refused else None


def _score(control: Path) -> dict[str, float]:
    from alignez_gguf.control.control_file import ControlFile

    score = ControlFile.load(control).score
    return {key: value for key in ("score", "kl") if isinstance(value := score.get(key), float)}


def _alignez(command: Sequence[str], text_out: TextIO) -> None:
    program = Path(sys.executable).with_name("alignez-gguf")
    print(f"$ alignez-gguf {shlex.join(command)}", file=text_out, flush=True)
    status = subprocess.run([str(program), *command], stdout=text_out).returncode
    if status != 0:
        raise CommandError(f"{command[0]} failed (exit status {status})")


def _print_table(outcomes: Sequence[Outcome], held_out: Sequence[DatasetRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    done = [outcome for outcome in outcomes if outcome.base is not None]
    if done:
        table = Table(title=f"refusals among {len(held_out)} requests that the export never saw")
        for header in ("model", "of harmful", "steered", "of harmless", "steered", "score", "KL", "seconds"):
            table.add_column(header, justify="left" if header == "model" else "right")
        for outcome in done:
            steered = outcome.steered or Refusals(None, None)
            base = outcome.base or Refusals(None, None)
            figures = (
                base.harmful,
                steered.harmful,
                base.harmless,
                steered.harmless,
                outcome.score,
                outcome.kl,
            )
            table.add_row(outcome.model, *map(_shown, figures), f"{outcome.seconds:.0f}")
        Console().print(table)
    for outcome in outcomes:
        if outcome.note:
            print(f"{outcome.model}: {outcome.note}")


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
