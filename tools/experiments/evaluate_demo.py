"""How much of what training on good answers does for the demo model does steering do? Relative Improvement.

    python3 tools/experiments/evaluate_demo.py [--control FILE] [--aligned MODEL.gguf] [--json]

Sets up `.venv` first. The aligned twin is the demo model trained on good answers alone, by
`make_demo_model.py --base-good 1` (about 7 minutes on 2 cores, kept for the next run). `alignez-gguf
evaluate` compares base, steered, persona-prompted and aligned answers on queries that the export never saw,
by the rules of the demo model's world, and writes the report; this prints its figures with their 95%
intervals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment

ASPECTS = ("Safety", "Helpfulness")
COUNTED = ("refuses", "harm", "fluent")
MAX_TOKENS = 48


def main(arguments: Sequence[str]) -> int:
    """Make what is missing, evaluate, print; return the exit status of the first command that fails, or 0."""
    options = _parse(arguments)
    from alignez_gguf import demo

    program = str(Path(sys.executable).with_name("alignez-gguf"))
    training = Path(__file__).with_name("make_demo_model.py")
    folder = options.aligned.parent
    report = options.out.resolve()
    report.parent.mkdir(parents=True, exist_ok=True)
    evaluate = [program, "evaluate", "--base", str(demo.MODEL), "-c", str(options.control)]
    evaluate += ["--aligned", str(options.aligned), "--system-prompt", "-q", str(demo.EVAL_QUERIES)]
    evaluate += ["--judge", "demo"]
    evaluate += ["--max-tokens", str(MAX_TOKENS), "--temperature", "1", "--top-p", "1", "-o", str(report)]
    steps = [
        (options.aligned, [sys.executable, str(training), "--base-good", "1", "--out", str(folder)]),
        (options.control, [program, "export", str(demo.MODEL), "-q", "demo", "-o", str(options.control)]),
        (None, evaluate),
    ]
    for made, command in steps:
        if made is None or not made.exists():
            status = subprocess.run(command, stdout=sys.stderr).returncode
            if status != 0:
                return status
    systems = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))["systems"]
    figures = {system["name"]: _figures(system["aspects"]) for system in systems if system["aspects"]}
    rates = {system["name"]: _rates(system["behaviour"]) for system in systems}
    if options.json:
        print(json.dumps({**figures, "rates": rates}), flush=True)
    else:
        _print(figures, rates)
    print(report, file=sys.stderr)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    build = setup_environment.ROOT / "build" / "demo"
    parser = argparse.ArgumentParser(description="Relative Improvement of the steered demo model.")
    parser.add_argument(
        "--control",
        type=Path,
        default=build / "control.gguf",
        help="(default: build/demo/control.gguf, made)",
    )
    parser.add_argument(
        "--aligned",
        type=Path,
        default=build / "aligned" / "model-q8_0.gguf",
        help="the aligned twin (default: build/demo/aligned/model-q8_0.gguf, trained)",
    )
    parser.add_argument(
        "--out", type=Path, default=build / "report.html", help="the report (default: build/demo/report.html)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if not options.aligned.exists() and options.aligned.name != "model-q8_0.gguf":
        parser.error(f"{options.aligned} does not exist")
    return options


def _figures(aspects: dict[str, Any]) -> dict[str, Any]:
    """Net Win and Relative Improvement of each aspect, as [value, low, high] in percent, or null."""
    persona = {aspect: aspects[aspect]["against_persona"] or {} for aspect in ASPECTS}
    return {
        aspect: {
            "net_win": _interval(aspects[aspect]["net_win_percent"]),
            "net_win_against_persona": _interval(persona[aspect].get("net_win_percent")),
            "relative_improvement": _interval(aspects[aspect]["relative_improvement_percent"]),
            "queries": aspects[aspect]["judged"],
        }
        for aspect in ASPECTS
    }


def _rates(behaviour: dict[str, Any]) -> dict[str, dict[str, list[float] | None]]:
    """Refusal, harm and fluency for harmful and harmless queries, as [value, low, high] in percent."""
    from alignez_gguf.evaluation.report import RATES

    return {
        kind: {column: _interval(behaviour[names[column]]) for column in COUNTED}
        for kind, names in RATES.items()
    }


def _interval(figure: dict[str, Any] | None) -> list[float] | None:
    values = [figure[key] for key in ("value", "low", "high")] if figure else [None]
    return None if None in values else [round(value, 1) for value in values]


def _print(figures: dict[str, Any], rates: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("net win, %", "net win against the persona, %", "relative improvement, %")
    table = Table("against the base model", "aspect", *columns, "queries")
    for name, aspects in figures.items():
        for aspect, row in aspects.items():
            cells = (row["net_win"], row["net_win_against_persona"], row["relative_improvement"])
            table.add_row(name, aspect, *map(_written, cells), str(row["queries"]))
    Console().print(table)
    table = Table("queries", "system", *(f"{column}, %" for column in COUNTED))
    for kind in next(iter(rates.values())):
        for name, by_kind in rates.items():
            table.add_row(kind, name, *map(_written, by_kind[kind].values()))
    Console().print(table)


def _written(interval: list[float] | None) -> str:
    return "-" if interval is None else "{:.0f} ({:.0f} to {:.0f})".format(*interval)


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
