"""`tools/experiments/quantization_sweep.py --agreement`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "experiments"))

import quantization_sweep  # noqa: E402


def run(out: Path, *options: str) -> int:
    return quantization_sweep.main(["--agreement", "--out", str(out), "--threads", "1", *options])


def test_patched_and_stock_agree_at_every_level_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(tmp_path, "--level", "Q4_1", "--level", "BF16", "--json")

    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert [(one["level"], one["types"]) for one in found] == [("BF16", ["BF16"]), ("Q4_1", ["Q4_1"])]
    for one in found:
        assert one["holds"]
        assert one["patched_error"] < 1e-5
        assert one["stock_error"] < 1e-5
        assert one["difference"] <= 2 * one["rounding"] < 0.1
    assert not list(tmp_path.iterdir())


def test_the_table_has_a_row_for_each_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--level", "Q8_0") == 0

    printed = capsys.readouterr().out
    assert "logits, patched to stock" in printed
    assert "Q8_0" in printed


def test_an_unknown_level_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no level Q9"):
        run(tmp_path, "--level", "Q9")
