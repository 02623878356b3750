"""PEFT adapters, loaded by peft into the transformers model, against forward hooks on that model."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import OutputError, SteeringError
from alignez_gguf.exporters import peft
from alignez_gguf.exporters.weights import ModelWeights
from tests.models import tiny_model
from tests.runtime.oracle import hooked_logits

TOKENS = list(range(5, 45))
PARITY = 5e-5
random = np.random.default_rng(0).standard_normal
EDITS = {0: LayerEdit(remove=random((1, 64))), 2: LayerEdit(remove=random((3, 64)))}


def write(gguf: Path, edits: dict[int, LayerEdit], output: Path) -> list[Path]:
    return peft.write(ControlFile(ModelInfo.from_gguf(gguf), edits), ModelWeights(gguf), output)


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma3", "granite", "phi3"]
)
def test_transformers_with_the_adapter_equals_forward_hooks(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)

    write(model.gguf, EDITS, tmp_path / "adapter")

    adapted = PeftModel.from_pretrained(copy.deepcopy(model.hf), str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = adapted(torch.tensor([TOKENS])).logits[0].numpy()
    expected = hooked_logits(model, TOKENS, EDITS)
    assert np.abs(logits - expected).max() < PARITY
    assert np.abs(expected - hooked_logits(model, TOKENS, {})).max() > 0.1


REFUSED = {
    "an addition": ("llama", {}, {1: LayerEdit(add=random(64))}, "adds at layer 1"),
    "a mixture": ("mixtral", {}, EDITS, "mixture of experts"),
    "a bias": ("llama", {"mlp_bias": True}, EDITS, "a bias"),
    "an unknown architecture": ("qwen2moe", {}, EDITS, "qwen2moe"),
}


@pytest.mark.parametrize(("architecture", "config", "edits", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_lora_of_down_proj_cannot_carry_is_refused_and_nothing_is_written(
    architecture: str, config: dict[str, bool], edits: dict[int, LayerEdit], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SteeringError, match=message):
        write(tiny_model(architecture, **config).gguf, edits, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    gguf = tiny_model("llama").gguf
    write(gguf, EDITS, tmp_path / "adapter")
    first = (tmp_path / "adapter" / peft.WEIGHTS).read_bytes()
    write(gguf, {1: EDITS[0]}, tmp_path / "adapter")
    assert (tmp_path / "adapter" / peft.WEIGHTS).read_bytes() != first

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(OutputError, match="not an adapter"):
        write(gguf, EDITS, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]
