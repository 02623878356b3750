"""Run every check: formatting, lint, types and the tests. Extra arguments go to pytest.

    python3 tools/test.py [-k parity -x ...]

Sets up `.venv` first, so a fresh machine needs nothing but Python, a C++ compiler and cmake.
"""

from __future__ import annotations

import subprocess
import sys

import setup_environment


def main(pytest_arguments: list[str]) -> int:
    """Run all checks, also after one fails; return 1 if any did."""
    commands = {
        "ruff format": ["ruff", "format", "--check", "."],
        "ruff check": ["ruff", "check", "."],
        "mypy": ["mypy"],
    }
    failed = [name for name, command in commands.items() if _run(name, command) != 0]
    status, summary = _run_pytest(pytest_arguments)
    if status != 0:
        failed.append("pytest")
    print(f"FAILED: {', '.join(failed)}" if failed else "all checks passed")
    print(summary, end="", flush=True)
    return 1 if failed else 0


def _run(name: str, command: list[str]) -> int:
    print(f"== {name}", flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=setup_environment.ROOT).returncode


def _run_pytest(arguments: list[str]) -> tuple[int, str]:
    """Run pytest; its last line, the summary, is kept back so that it can end the whole output."""
    print("== pytest", flush=True)
    color = ["--color=yes"] if sys.stdout.isatty() else []
    last = ""
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *color, *arguments],
        cwd=setup_environment.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(last, end="", flush=True)
            last = line
    return process.returncode, last


if __name__ == "__main__":
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
