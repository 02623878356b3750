"""The contracts of pyproject.toml on what may import what; docs/architecture.md says them in words."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_every_import_keeps_to_the_layers() -> None:
    assert lint_imports(str(ROOT / "pyproject.toml"), no_cache=True) == 0
