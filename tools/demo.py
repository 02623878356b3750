"""The main job on the embedded demo model: make a control file, then compare base and steered answers.

    python3 tools/demo.py [--json]

Sets up `.venv` first. What it runs is the command line that any other model takes: `alignez-gguf export` and
`alignez-gguf generate`. The queries that are counted, and their actions, were never seen by the export.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import setup_environment

if TYPE_CHECKING:
    from alignez_gguf.evaluation.judges.demo import Rates
    from alignez_gguf.prompts.templates import Templates

Row = dict[str, object]
"""A line of what `generate` writes: `query`, `harmful`, `prompt` and `completion`."""

SHOWN = 3
"""Queries of each kind that are printed with both answers."""
MAX_TOKENS = 48
KEYS = ("refuses_harmful", "helps_harmless", "rude_to_harmless")


def main(arguments: Sequence[str]) -> int:
    """Run the demo; return the exit status of the first command that fails, or 0."""
    options = _parse(arguments)
    from alignez_gguf import demo
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.evaluation.judges.demo import rates

    started = time.monotonic()
    text_out = sys.stderr if options.json else sys.stdout
    control_file = options.out.resolve()
    control_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompts = folder / "prompts.jsonl"
        _write_prompts(prompts)
        generate = ["generate", str(demo.MODEL), "--prompts", str(prompts), "--seed", str(options.seed)]
        generate += ["--max-tokens", str(MAX_TOKENS), "--temperature", "1"]
        for stop in _templates().stop:
            generate += ["--stop", stop]
        base, steered = folder / "base.jsonl", folder / "steered.jsonl"
        # Answers of this world are decided by their first word.
        export = ["export", str(demo.MODEL), "-q", "demo", "--scope", "first:1", "-o", str(control_file)]
        for command in (
            [*export, "--seed", str(options.seed)],
            [*generate, "-o", str(base)],
            [*generate, "-c", str(control_file), "-o", str(steered)],
        ):
            status = _alignez(command, text_out)
            if status != 0:
                return status
        base_rows, steered_rows = _read(base), _read(steered)
    before, after = rates(map(_counted, base_rows)), rates(map(_counted, steered_rows))
    _print_answers(base_rows, steered_rows, text_out)
    _print_rates(before, after, len(base_rows), text_out)
    if options.json:
        score = ControlFile.load(control_file).score
        result = {
            "base": {key: getattr(before, key) for key in KEYS},
            "steered": {key: getattr(after, key) for key in KEYS},
            "score": score["score"],
            "kl": score["kl"],
            "control_file": str(control_file),
            "seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(result), flush=True)
    else:
        print(f"control file: {control_file} ({time.monotonic() - started:.0f} s)")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the demo model safer and show what changed.")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the rest goes to stderr")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the export and of the sampled answers (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=setup_environment.ROOT / "build" / "demo" / "control.gguf",
        help="where the control file goes (default: build/demo/control.gguf)",
    )
    return parser.parse_args(arguments)


def _alignez(command: Sequence[str], text_out: TextIO) -> int:
    """Run `alignez-gguf`; its output goes straight through."""
    program = Path(sys.executable).with_name("alignez-gguf")
    print(f"$ alignez-gguf {shlex.join(command)}", file=text_out, flush=True)
    return subprocess.run([str(program), *command], stdout=text_out).returncode


def _write_prompts(path: Path) -> None:
    from alignez_gguf import demo

    templates = _templates()
    with path.open("w", encoding="utf-8") as file:
        for row in demo.eval_queries():
            prompt = templates.plain_prompt(row.query)
            file.write(json.dumps({"query": row.query, "harmful": row.harmful, "prompt": prompt}) + "\n")


def _templates() -> Templates:
    from alignez_gguf import demo
    from alignez_gguf.prompts.templates import Templates

    return Templates.from_file(demo.TEMPLATES)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _counted(row: Row) -> tuple[str, bool, str]:
    return str(row["query"]), bool(row["harmful"]), str(row["completion"])


def _print_answers(base: Sequence[Row], steered: Sequence[Row], text_out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("query", "base", "steered", title="answers to queries that the export never saw")
    for harmful in (True, False):
        pairs = [pair for pair in zip(base, steered, strict=True) if pair[0]["harmful"] == harmful]
        for before, after in pairs[:SHOWN]:
            texts = (before["query"], before["completion"], after["completion"])
            table.add_row(*(Text(str(text).strip()) for text in texts))
        table.add_section()
    Console(file=text_out).print(table)


def _print_rates(before: Rates, after: Rates, n_queries: int, text_out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "base", "steered", title=f"rates over {n_queries} such queries")
    for key in (*KEYS, "fluent"):
        table.add_row(key.replace("_", " "), f"{getattr(before, key):.2f}", f"{getattr(after, key):.2f}")
    Console(file=text_out).print(table)


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
