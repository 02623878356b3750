"""The stock forms, read back."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import ControlFileError
from alignez_gguf.exporters.stock_reader import is_lora, read
from alignez_gguf.exporters.weights import ModelWeights
from tests.exporters.adapted import written
from tests.models import quantized, tiny_model

random = np.random.default_rng(0).standard_normal
EDITS = {
    1: LayerEdit(remove=random((3, 64)), add=0.3 * random(64)),
    2: LayerEdit(remove=random((2, 64))),
}
STORED = {"Q8_0": "Q8_0", "Q4_K_M": "Q6_K", "Q4_1": "Q5_1", "Q5_1": "Q5_1", "BF16": "BF16"}
"""The type that keeps A, by the type of the model."""


@pytest.mark.parametrize(
    ("architecture", "config"), [("llama", {}), ("qwen2moe", {}), ("granite", {"mlp_bias": True})]
)
def test_what_was_written_is_read(architecture: str, config: dict[str, bool], tmp_path: Path) -> None:
    model = tiny_model(architecture, **config).gguf

    control = read(written(model, EDITS, tmp_path), ModelWeights(model))

    assert list(control.edits) == list(EDITS)
    for layer, edit in EDITS.items():
        got = control.edits[layer]
        assert got.decision == edit.decision
        assert edit.remove is not None
        assert got.remove is not None
        assert np.array_equal(got.remove, edit.remove)
        if edit.add is not None:
            assert got.add is not None
            assert np.abs(got.add - edit.add).max() < 1e-6


@pytest.mark.parametrize(
    ("architecture", "file_type"),
    [("llama", "Q8_0"), ("qwen2moe", "Q4_K_M"), ("llama", "Q4_1"), ("qwen2moe", "Q5_1"), ("llama", "BF16")],
)
def test_what_was_written_for_a_quantized_model_is_read(
    architecture: str, file_type: str, tmp_path: Path
) -> None:
    model = quantized(tiny_model(architecture, n_embd=256).gguf, file_type)
    edits = {1: LayerEdit(remove=random((3, 256))), 2: LayerEdit(remove=random((1, 256)))}

    files = written(model, edits, tmp_path)
    control = read(files, ModelWeights(model))

    stored = {tensor.tensor_type.name for tensor in gguf.GGUFReader(files[0]).tensors}
    assert stored == {"F32", STORED[file_type]}
    assert list(control.edits) == list(edits)
    for layer, edit in edits.items():
        got = control.edits[layer].remove
        assert got is not None
        assert edit.remove is not None
        assert np.array_equal(got, edit.remove)


@pytest.mark.parametrize("file_type", ["Q4_0", "Q8_0"])
def test_a_lora_that_was_made_from_another_quantization_is_refused(file_type: str, tmp_path: Path) -> None:
    model = tiny_model("llama").gguf
    other = "Q8_0" if file_type == "Q4_0" else "Q4_0"
    files = written(quantized(model, file_type), EDITS, tmp_path)

    with pytest.raises(ControlFileError, match="made from another file"):
        read(files[:1], ModelWeights(quantized(model, other)))


def test_a_lora_that_was_made_from_another_file_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama").gguf
    files = written(model, EDITS, tmp_path)

    with pytest.raises(ControlFileError, match="made from another file"):
        read(files[:1], ModelWeights(quantized(model, "Q4_0")))


def test_a_lora_for_another_architecture_is_refused(tmp_path: Path) -> None:
    files = written(tiny_model("llama").gguf, EDITS, tmp_path)

    with pytest.raises(ControlFileError, match="architecture llama"):
        read(files[:1], ModelWeights(tiny_model("qwen2").gguf))


def test_a_lora_is_told_from_a_control_file(tmp_path: Path) -> None:
    model = tiny_model("llama").gguf
    lora, cvec = written(model, EDITS, tmp_path)
    ControlFile(ModelInfo.from_gguf(model), EDITS).save(tmp_path / "native.gguf")

    assert is_lora(lora)
    assert not is_lora(cvec)
    assert not is_lora(tmp_path / "native.gguf")


def test_an_a_that_rounds_otherwise_than_the_weight_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions before wrote it for a model in Q4_1."""
    model = quantized(tiny_model("llama").gguf, "Q4_1")
    with monkeypatch.context() as patched:
        patched.setattr("alignez_gguf.exporters.stock.carrier", lambda _: None)
        files = written(model, {2: EDITS[2]}, tmp_path)

    with pytest.raises(ControlFileError, match=r"rounds otherwise.*convert the control again"):
        read(files, ModelWeights(model))
