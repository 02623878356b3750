"""From a model to its control file with both recipes: how long, in which stages, and how much memory.

The recipes run one after the other as the command line runs them, in one work directory, so that the second
finds the pairs of the first. Answers of a random model hardly ever end early: all are as long as they may be.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import BenchError, Figure, Measured
from benchmarks.setting import Setting

_RECIPES = ("paper", "auto")
_CHILD = Path(__file__).with_name("export_child.py")
_NO_GAIN = ("nothing makes this model safer", "no layer's probe is sure enough")
_MEGABYTE = 1_000_000
_SHOWN_SHARE = 0.005
"""Of the time of all stages, from which on one is shown."""


class ExportError(BenchError):
    """The export failed."""


@dataclass(frozen=True)
class _Run:
    """One export: how long, the most memory in bytes, seconds by stage, and whether it found a file."""

    seconds: float
    peak: int
    stages: Counter[str]
    found: bool


def measure(setting: Setting, max_tokens: int | None = None) -> Measured:
    """Minutes and megabytes of `alignez-gguf export`, recipe paper and recipe auto."""
    import alignez_gguf
    from alignez_gguf.prompts.queries import load_queries

    with tempfile.TemporaryDirectory() as folder:
        queries = Path(folder) / "queries.txt"
        queries.write_text("\n".join(load_queries("default")[: setting.n_queries]), encoding="utf-8")
        runs = {recipe: _export(setting, recipe, queries, Path(folder), max_tokens) for recipe in _RECIPES}
    n_bytes = setting.model.stat().st_size
    figures = {
        "minutes": Figure(
            f"both recipes, {setting.n_queries} queries",
            sum(run.seconds for run in runs.values()) / 60,
            bound=10.0,
            unit=" min",
        ),
        "extra_mb": Figure(
            "peak memory beyond the size of the model's file",
            (max(run.peak for run in runs.values()) - n_bytes) / _MEGABYTE,
            bound=600.0,
            unit=" MB",
        ),
    }
    for recipe, run in runs.items():
        what = "" if run.found else ", which finds nothing that is worth it on these weights"
        figures[f"{recipe}_minutes"] = Figure(f"recipe {recipe}{what}", run.seconds / 60, unit=" min")
    stages = sum((run.stages for run in runs.values()), Counter[str]())
    for stage, taken in stages.most_common():
        if taken >= _SHOWN_SHARE * sum(stages.values()):
            figures[f"seconds: {stage}"] = Figure("a stage, both recipes", taken, unit=" s")
    return Measured(figures, {"alignez-gguf": alignez_gguf.__version__})


def _export(setting: Setting, recipe: str, queries: Path, folder: Path, max_tokens: int | None) -> _Run:
    command = [
        *(sys.executable, str(_CHILD), "export", str(setting.model), "-q", str(queries)),
        *("-o", str(folder / f"{recipe}.gguf"), "--recipe", recipe, "--work-dir", str(folder / "work")),
        *("--threads", str(setting.n_threads), "--gpu-layers", str(setting.n_gpu_layers)),
        *(() if max_tokens is None else ("--max-tokens", str(max_tokens))),
    ]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    taken = time.perf_counter() - began
    found = done.returncode == 0
    peak = re.search(r"^peak memory: (\d+) bytes$", done.stderr, re.MULTILINE)
    if peak is None or not (found or any(reason in done.stderr for reason in _NO_GAIN)):
        raise ExportError(f"export --recipe {recipe} ended with {done.returncode}: {done.stderr[-500:]}")
    return _Run(taken, int(peak[1]), _stages(done.stderr), found)


def _stages(said: str) -> Counter[str]:
    """Seconds of the stages that the export names, each on a line of its own."""
    stages: Counter[str] = Counter()
    for title, taken in re.findall(r"^(.+): ([0-9.]+) s$", said, re.MULTILINE):
        stages[title] += float(taken)  # type: ignore[assignment]
    return stages
