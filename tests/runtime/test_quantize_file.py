from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import ModelFileError
from alignez_gguf.runtime.quantize import LEVELS, needs_super_blocks, quantize_file
from tests.models import tiny_model

WEIGHT = "blk.0.ffn_gate.weight"


@pytest.fixture(scope="module")
def source() -> Path:
    return tiny_model("llama", n_embd=256).gguf


def weight(path: Path) -> gguf.ReaderTensor:
    (found,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == WEIGHT]
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_level_decides_the_type_of_the_weights_and_keeps_their_values(
    source: Path, tmp_path: Path, level: str
) -> None:
    target = tmp_path / "model.gguf"
    quantize_file(source, target, level)
    info = ModelInfo.from_gguf(target)
    assert info.quantization == level
    assert target.stat().st_size < source.stat().st_size
    found, original = weight(target), np.asarray(weight(source).data, np.float32)
    assert found.tensor_type.name == level.removesuffix("_M")
    restored = gguf.dequantize(found.data, found.tensor_type)
    error = np.linalg.norm(restored - original) / np.linalg.norm(original)
    assert error < (0.5 if level == "Q2_K" else 0.25)


def test_quantized_model_can_be_quantized_again(source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    quantize_file(source, once, "Q8_0")
    quantize_file(once, twice, "Q4_0")
    assert weight(twice).tensor_type.name == "Q4_0"


def test_what_is_no_model_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    source, target = tmp_path / "broken.gguf", tmp_path / "model.gguf"
    source.write_bytes(b"GGUF, but not really")
    with pytest.raises(ModelFileError, match=r"cannot quantize .*broken\.gguf to Q4_0"):
        quantize_file(source, target, "Q4_0")
    assert not target.exists()


def test_k_and_iq_levels_need_rows_of_whole_super_blocks() -> None:
    plain = {level for level in LEVELS if not needs_super_blocks(level)}
    assert plain == {"F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"}
