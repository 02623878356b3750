"""The command line over the demo model, within this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from alignez_gguf import demo
from alignez_gguf.cli import main
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit

Run = Callable[..., Result]

PROGRAM = [sys.executable, "-c", "from alignez_gguf.cli import main; main(prog_name='alignez-gguf')"]
"""The command line as a process of its own."""


@pytest.fixture(scope="session")
def model() -> str:
    return str(demo.MODEL)


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random directions for the demo model, strong enough to change its answers."""
    info = ModelInfo.from_gguf(demo.MODEL)
    normal = np.random.default_rng(0).standard_normal
    edits = {
        0: LayerEdit(remove=normal(info.n_embd)),
        info.n_layer // 2: LayerEdit(remove=normal((3, info.n_embd)), add=20 * normal(info.n_embd)),
    }
    path = tmp_path_factory.mktemp("control") / "control.gguf"
    ControlFile(info, edits, recipe={"name": "by [hand]", "seed": 3}).save(path)
    return str(path)


def write_queries(folder: Path, count: int) -> str:
    """A file of the first queries of the demo world."""
    path = folder / "queries.txt"
    lines = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:count]), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def queries(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two dozen queries of the demo world."""
    return write_queries(tmp_path_factory.mktemp("queries"), 24)


@pytest.fixture(scope="session")
def few_queries(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Too few queries to measure on some of them what edits gain."""
    return write_queries(tmp_path_factory.mktemp("few"), 16)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder, on one thread; any exception but an exit is the test's failure."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str | bytes = b"") -> Result:
        threads = [] if arguments[0] in ("inspect", "runtime", "convert") else ["--threads", "1"]
        return CliRunner(catch_exceptions=False).invoke(main, [*map(str, arguments), *threads], input=stdin)

    return run


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail: with one line on standard error, and nothing left behind."""

    def refused(*arguments: str, exit_code: int = 1, stdin: str | bytes = b"") -> str:
        before = sorted(tmp_path.rglob("*"))
        result = run(*arguments, stdin=stdin)
        lines = result.stderr.splitlines()
        assert result.exit_code == exit_code, result.output
        assert lines[-1].startswith("Error: ")
        assert len(lines) == 1 or (exit_code == 2 and lines[0].startswith("Usage: ")), result.stderr
        assert result.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before
        return lines[-1]

    return refused


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with some variables set, or removed (`None`)."""
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}
