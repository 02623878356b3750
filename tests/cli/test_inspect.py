from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile, LayerReport, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.gate import Gate
from tests.cli.conftest import Run

INFO = ModelInfo("llama", 4, 3, name="[b]tiny[/b] model [/]", fingerprint="f" * 64, quantization="Q8_0")


@pytest.fixture
def by_hand(tmp_path: Path) -> str:
    edits = {
        0: LayerEdit(remove=np.eye(4)[:2]),
        2: LayerEdit(add=np.array([3.0, 0, 4, 0]), remove=np.eye(4)[3]),
    }
    report = LayerReport(
        accuracy=np.array([0.5, 0.75, 1.0], np.float32),
        p_helpful=np.array([0.25, 0.5, 0.125], np.float32),
        p_harmful=np.array([0.75, 0.5, 0.875], np.float32),
    )
    score = {"score": 1.5, "tried.score": (1.5, -0.25)}
    path = tmp_path / "by_hand.gguf"
    ControlFile(INFO, edits, recipe={"method": "mean", "seed": 7}, layers=report, score=score).save(path)
    return str(path)


@pytest.fixture
def foreign(tmp_path: Path) -> str:
    """As repeng writes it."""
    path = tmp_path / "repeng.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    writer.add_tensor("direction.1", np.array([0, 3, 4], np.float32))
    writer.add_tensor("direction.3", np.array([1, 0, 0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_json_holds_everything(run: Run, by_hand: str) -> None:
    result = run("inspect", by_hand, "--json")
    assert result.stderr == ""
    assert json.loads(result.stdout) == {
        "model": {
            "arch": "llama",
            "n_embd": 4,
            "n_layer": 3,
            "name": "[b]tiny[/b] model [/]",
            "fingerprint": "f" * 64,
            "quantization": "Q8_0",
        },
        "sha256": ControlFile.load(by_hand).sha256,
        "recipe": {"method": "mean", "seed": 7},
        "score": {"score": 1.5, "tried.score": [1.5, -0.25]},
        "gate": None,
        "layers": [
            {
                "layer": 0,
                "decision": "remove",
                "rank": 2,
                "added_length": 0.0,
                "accuracy": 0.5,
                "p_helpful": 0.25,
                "p_harmful": 0.75,
            },
            {
                "layer": 1,
                "decision": "none",
                "rank": 0,
                "added_length": 0.0,
                "accuracy": 0.75,
                "p_helpful": 0.5,
                "p_harmful": 0.5,
            },
            {
                "layer": 2,
                "decision": "remove+add",
                "rank": 1,
                "added_length": 5.0,
                "accuracy": 1.0,
                "p_helpful": 0.125,
                "p_harmful": 0.875,
            },
        ],
    }


def cells(output: str) -> list[list[str]]:
    """The rows of a table."""
    rows = [line.replace("┃", "│").split("│") for line in output.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in row[1:-1]] for row in rows]


def test_table_has_a_row_for_every_layer(run: Run, by_hand: str) -> None:
    output = run("inspect", by_hand).stdout
    assert cells(output) == [
        ["layer", "decision", "rank", "added length", "accuracy", "p helpful", "p harmful"],
        ["0", "remove", "2", "0.000", "0.500", "0.250", "0.750"],
        ["1", "none", "0", "0.000", "0.750", "0.500", "0.500"],
        ["2", "remove+add", "1", "5.000", "1.000", "0.125", "0.875"],
    ]
    assert "for llama with 3 layers of width 4: [b]tiny[/b] model [/] Q8_0" in output
    assert "recipe: method mean, seed 7" in output
    assert "score: score 1.500\n" in output


def test_file_with_directions_alone_is_shown_up_to_its_last_layer(run: Run, foreign: str) -> None:
    result = run("inspect", foreign)
    assert cells(result.stdout) == [
        ["layer", "decision", "rank", "added length"],
        ["0", "none", "0", "0.000"],
        ["1", "add", "0", "5.000"],
        ["2", "none", "0", "0.000"],
        ["3", "add", "0", "1.000"],
    ]
    described = json.loads(run("inspect", foreign, "--json").stdout)
    assert described["model"]["arch"] == "mistral"
    assert (described["recipe"], described["score"]) == ({}, {})
    assert [layer["decision"] for layer in described["layers"]] == ["none", "add", "none", "add"]


def test_model_is_refused_as_a_control_file(run: Run) -> None:
    result = run("inspect", str(demo.MODEL))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "is it a model?" in result.stderr


def test_missing_file_is_refused(run: Run) -> None:
    result = run("inspect", "none.gguf")
    assert result.exit_code == 1
    assert result.stderr == "Error: cannot read none.gguf: No such file or directory\n"


def test_gate_is_told(run: Run, tmp_path: Path) -> None:
    gate = Gate(np.arange(3, dtype=np.int32), np.ones(3, np.float32), -0.125)
    path = tmp_path / "gated.gguf"
    ControlFile(INFO, {0: LayerEdit(add=np.ones(4))}, gate=gate).save(path)
    assert json.loads(run("inspect", str(path), "--json").stdout)["gate"] == {
        "tokens": 3,
        "threshold": -0.125,
    }
    output = " ".join(run("inspect", str(path)).stdout.split())
    assert (
        "gate: steers where the weighted log-probabilities of 3 tokens behind the prompt exceed -0.125"
        in output
    )
