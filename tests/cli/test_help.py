from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import alignez_gguf
from alignez_gguf.cli import _COMMANDS
from tests.cli.conftest import PROGRAM, Run

HEAVY = ("torch", "llama_cpp", "numpy", "gguf", "transformers", "rich", "jinja2")


def test_help_is_there_in_less_than_300_milliseconds() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([*PROGRAM, "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    # The best of several: other work on the machine must not count.
    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in _COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from alignez_gguf.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, alignez_gguf; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["", *_COMMANDS, "runtime build", "runtime status"])
def test_help_of_every_command_has_an_example(run: Run, tmp_path: Path, command: str) -> None:
    from click.testing import CliRunner

    from alignez_gguf.cli import main

    for option in ("--help", "-h"):
        result = CliRunner().invoke(main, [*command.split(), option], prog_name="alignez-gguf")
        assert result.exit_code == 0
        if command != "runtime":
            assert "Example" in result.stdout
            assert f"\n  alignez-gguf {command}" in result.stdout.replace("    alignez", "  alignez")


def test_help_lists_every_command(run: Run) -> None:
    from click.testing import CliRunner

    from alignez_gguf.cli import main

    listed = CliRunner().invoke(main, ["--help"]).stdout
    for name, line in _COMMANDS.items():
        assert name in listed
        assert line in listed


def test_version_is_that_of_the_package() -> None:
    done = subprocess.run([*PROGRAM, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"alignez-gguf, version {alignez_gguf.__version__}"


def test_package_is_a_program_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alignez_gguf", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"alignez-gguf, version {alignez_gguf.__version__}"
