"""`alignez-gguf verify`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.runtime import bindings
from alignez_gguf.steering.stock_adapters import StockAdapters
from tests.cli.conftest import Run

random = np.random.default_rng(0).standard_normal


@pytest.fixture
def carried_by_stock(tmp_path: Path) -> str:
    """A control file that needs no patch."""
    info = ModelInfo.from_gguf(demo.MODEL)
    edits = {
        0: LayerEdit(remove=random(info.n_embd)),
        2: LayerEdit(remove=random((2, info.n_embd)), add=20 * random(info.n_embd)),
    }
    ControlFile(info, edits).save(tmp_path / "control.gguf")
    return str(tmp_path / "control.gguf")


@pytest.mark.parametrize("runtime", ["auto", "stock"])
def test_a_control_that_acts_is_proven_layer_by_layer(
    run: Run, model: str, carried_by_stock: str, runtime: str
) -> None:
    result = run("verify", model, carried_by_stock, "--runtime", runtime, "--json", "--quiet")

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["ok"]
    assert found["off_bit_identical"]
    assert [check["layer"] for check in found["layers"]] == [0, 2]
    for check in found["layers"]:
        assert check["acts"]
        assert check["removed_after"] < 0.1 * check["removed_before"]
    added = found["layers"][1]
    assert added["added"] == pytest.approx(added["added_expected"], rel=0.01)


def test_the_table_says_what_each_layer_does(run: Run, model: str, carried_by_stock: str) -> None:
    result = run("verify", model, carried_by_stock, "--quiet")

    assert result.exit_code == 0
    assert "strength 0 bit-identical to no control: yes" in result.stdout
    assert "by rounding alone" in result.stdout
    assert "the stock form holds: yes" in result.stdout
    assert "steered:" in result.stdout


def test_both_ways_are_compared(run: Run, model: str, carried_by_stock: str) -> None:
    found = json.loads(run("verify", model, carried_by_stock, "--json", "--quiet").stdout)

    assert found["runtime"] == "patched"
    assert found["patched_stock_max_diff"] < 0.05 * found["logits_change"]
    assert found["stock_holds"]
    assert found["patched_stock_share"] < 0.05
    assert all(check["stock_error"] < 1e-5 for check in found["layers"])


def test_an_edit_that_rounding_drowns_fails_and_says_so(run: Run, model: str, tmp_path: Path) -> None:
    info = ModelInfo.from_gguf(demo.MODEL)
    ControlFile(info, {2: LayerEdit(add=1e-4 * random(info.n_embd))}).save(tmp_path / "inert.gguf")

    result = run("verify", model, "inert.gguf", "--json", "--quiet")

    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["logits_change"] > 0
    assert found["floor"] > 0.5
    assert result.stderr.count("\n") == 1
    assert "not above rounding" in result.stderr


def test_a_stock_form_that_does_not_hold_fails_and_is_shown(
    run: Run, model: str, carried_by_stock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_strength = StockAdapters._set
    monkeypatch.setattr(StockAdapters, "_set", lambda self, strength: set_strength(self, 0.5 * strength))

    found = json.loads(run("verify", model, carried_by_stock, "--json", "--quiet").stdout)
    result = run("verify", model, carried_by_stock, "--quiet")

    assert result.exit_code == 1
    assert not found["ok"]
    assert found["stock_holds"] is False
    assert all(check["acts"] for check in found["layers"])
    assert "the stock form holds: no" in result.stdout
    assert "the patched runtime holds, the stock form" in result.stderr
    assert "convert --format stock" in result.stderr


def test_a_layer_that_does_not_act_is_named_and_fails(
    run: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = ModelInfo.from_gguf(demo.MODEL)
    edits = {0: LayerEdit(add=random(info.n_embd)), 1: LayerEdit(remove=random(info.n_embd))}
    ControlFile(info, edits).save(tmp_path / "control.gguf")

    result = run("verify", model, "control.gguf", "--runtime", "stock", "--json", "--quiet")

    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [check["acts"] for check in found["layers"]] == [False, True]
    assert "adds at layer 0" in found["layers"][0]["reason"]
    assert "layers 0 do not act: the control adds at layer 0" in result.stderr


def test_a_control_for_another_model_is_refused(
    refused: Callable[..., str], model: str, tmp_path: Path
) -> None:
    other = ModelInfo("llama", n_embd=32, n_layer=2)
    ControlFile(other, {1: LayerEdit(remove=random(32))}).save(tmp_path / "other.gguf")

    assert "use one made for this model" in refused("verify", model, "other.gguf")


def test_the_patch_is_missed_where_it_is_asked_for(
    refused: Callable[..., str], model: str, carried_by_stock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "is_patched", lambda: False)

    message = refused("verify", model, carried_by_stock, "--runtime", "patched")

    assert "alignez-gguf runtime build" in message


def test_the_stock_form_is_proven_from_its_files(run: Run, model: str, carried_by_stock: str) -> None:
    run("convert", carried_by_stock, model, "--format", "stock", "-o", "safe")

    result = run("verify", model, "safe.lora.gguf", "safe.cvec.gguf", "--json", "--quiet")

    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["runtime"] == "stock"
    assert [check["decision"] for check in found["layers"]] == ["remove", "remove+add"]


def test_a_missing_control_is_named(refused: Callable[..., str], model: str) -> None:
    assert "missing.gguf" in refused("verify", model, "missing.gguf")
