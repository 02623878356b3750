"""Merged models, loaded as any other, against PyTorch with forward hooks on the original weights."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import OutputError, SteeringError
from alignez_gguf.exporters import merged
from alignez_gguf.exporters.requantise import Requantiser
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.runtime.quantize import quantize
from tests.models import ARCHITECTURES, OUT_OF_REACH, quantized, tiny_model
from tests.runtime.context import Context, rows
from tests.runtime.oracle import hooked_logits

RNG = np.random.default_rng(0)
TOKENS = [int(token) for token in RNG.integers(5, 380, 40)]
PARITY = 5e-5
"""Largest difference to PyTorch; both sum in float32, in another order."""
REMOVAL = {layer: LayerEdit(remove=RNG.standard_normal((2, 64))) for layer in range(3)}
BOTH = {
    layer: LayerEdit(remove=edit.remove, add=0.3 * RNG.standard_normal(64)) for layer, edit in REMOVAL.items()
}
LOADS_A_BIAS = {
    "llama": {},
    "mistral": {},
    "granite": {},
    "llama with a bias": {"mlp_bias": True},
    "granite with a bias": {"mlp_bias": True},
}


def merge(
    model: Path, edits: dict[int, LayerEdit], output: Path, **options: float
) -> list[merged.MergedWeight]:
    return merged.write(
        ControlFile(ModelInfo.from_gguf(model), edits), ModelWeights(model), output, **options
    )


def logits(model: Path) -> NDArray[np.float32]:
    with Context(model) as context:
        return context.logits(rows(TOKENS))


def largest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, OUT_OF_REACH])
def test_a_merged_removal_equals_forward_hooks(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    base = hooked_logits(model, TOKENS, {})
    floor = largest(logits(model.gguf), base)

    merge(model.gguf, REMOVAL, tmp_path / "out.gguf")

    expected = hooked_logits(model, TOKENS, REMOVAL)
    # The GELU table of ggml holds halves, so gemma is as far from PyTorch without an edit.
    assert largest(logits(tmp_path / "out.gguf"), expected) < max(PARITY, 2 * floor)
    assert largest(expected, base) > 0.1


BOOSTS = {
    0: LayerEdit.about(RNG.standard_normal(64), 0.3 * RNG.standard_normal(64), 0.5),
    1: LayerEdit.about(RNG.standard_normal((3, 64)), 0.3 * RNG.standard_normal(64), 1.0),
    2: LayerEdit(bias=0.3 * RNG.standard_normal(64), add=0.3 * RNG.standard_normal(64)),
}


@pytest.mark.parametrize("edits", [BOTH, BOOSTS], ids=["additions", "boosts and biases"])
@pytest.mark.parametrize(("name", "config"), LOADS_A_BIAS.items(), ids=LOADS_A_BIAS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_additions_boosts_and_biases_equal_forward_hooks_from_layer_0_on(
    name: str, config: dict[str, Any], strength: float, edits: dict[int, LayerEdit], tmp_path: Path
) -> None:
    model = tiny_model(name.split()[0], **config)

    merge(model.gguf, edits, tmp_path / "out.gguf", strength=strength)

    expected = hooked_logits(model, TOKENS, edits, strength)
    assert largest(logits(tmp_path / "out.gguf"), expected) < PARITY


@pytest.mark.parametrize("file_type", ["F32", "Q8_0"])
def test_merged_boost_is_what_the_patch_computes(file_type: str, tmp_path: Path) -> None:
    gguf_path = tiny_model("llama", n_embd=256).gguf
    model = gguf_path if file_type == "F32" else quantized(gguf_path, file_type)
    edits = {1: LayerEdit.about(RNG.standard_normal((2, 256)), 0.3 * RNG.standard_normal(256), 1.0)}
    with Context(model) as context:
        base = context.logits(rows(TOKENS))
        context.set_edits(edits)
        steered = context.logits(rows(TOKENS))

    merge(model, edits, tmp_path / "out.gguf")

    moved = largest(steered, base)
    assert largest(logits(tmp_path / "out.gguf"), steered) < (1e-4 if file_type == "F32" else 0.1 * moved)


@pytest.mark.parametrize("architecture", ["qwen2", "olmo2", "mixtral"])
def test_an_addition_that_the_architecture_cannot_carry_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=r"adds at layer 0.*--format stock"):
        merge(tiny_model(architecture).gguf, BOTH, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_all_metadata_and_all_other_tensors_are_kept(tmp_path: Path) -> None:
    model = tiny_model("llama").gguf

    merge(model, {1: BOTH[1]}, tmp_path / "out.gguf")

    before, after = gguf.GGUFReader(model), gguf.GGUFReader(tmp_path / "out.gguf")
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents()
            assert after.fields[name].types == field.types
    tensors = {tensor.name: tensor for tensor in after.tensors}
    changed = {"blk.1.ffn_down.weight", "blk.1.ffn_down.bias"}
    assert set(tensors) == {tensor.name for tensor in before.tensors} | changed
    for tensor in before.tensors:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(tensors[tensor.name].data, tensor.data) == (tensor.name not in changed)


@pytest.mark.parametrize(
    ("file_type", "kept"),
    [
        ("F16", {"F16"}),
        ("Q8_0", {"Q8_0"}),
        ("Q6_K", {"Q6_K"}),
        ("Q4_K_M", {"Q6_K", "Q8_0"}),
        ("Q4_0", {"Q8_0"}),
    ],
)
def test_a_weight_keeps_its_type_where_rounding_costs_little(
    file_type: str, kept: set[str], tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama", n_embd=256).gguf, file_type)
    edits = {layer: LayerEdit(remove=RNG.standard_normal((2, 256))) for layer in range(3)}

    report = merge(model, edits, tmp_path / "out.gguf")

    assert {weight.type for weight in report} == kept
    original, written = ModelWeights(model), ModelWeights(tmp_path / "out.gguf")
    for weight in report:
        before = original.tensors[weight.name].dequantised()
        after = written.tensors[weight.name].dequantised()
        v = edits[weight.layer].remove
        assert v is not None
        assert written.tensors[weight.name].type.name == weight.type
        # as the report says, by the definition of its figures
        came_back = np.linalg.norm(v @ after) / np.linalg.norm(v @ before)
        error = np.linalg.norm(after - (before - v.T @ v @ before)) / np.linalg.norm(before)
        assert weight.came_back == pytest.approx(came_back, rel=0.02, abs=1e-4)
        assert weight.error == pytest.approx(error, rel=0.02, abs=1e-4)
        assert came_back < 0.1
        assert error < 0.02


@pytest.mark.parametrize("file_type", ["Q4_0", "Q4_K_M", "IQ4_XS"])
def test_rounding_again_takes_away_what_plain_rounding_brings_back(file_type: str) -> None:
    model = ModelWeights(quantized(tiny_model("llama", n_embd=256).gguf, file_type))
    edit = LayerEdit(remove=RNG.standard_normal((1, 256)))
    v = edit.remove
    assert v is not None
    (down,) = model.down_projections(0)
    before = down.weight.dequantised()

    rows, share = Requantiser(down, edit, 1.0).rows(down.weight.type)

    plain = quantize(before - v.T @ (v @ before), down.weight.type)
    assert plain is not None

    def came_back(data: NDArray[np.uint8]) -> float:
        after = gguf.dequantize(data, down.weight.type)
        return float(np.linalg.norm(v @ after) / np.linalg.norm(v @ before))

    assert came_back(rows) == pytest.approx(share.came_back, rel=1e-3)
    assert came_back(rows) < 0.6 * came_back(plain)


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    split(model.gguf, tmp_path)

    merge(tmp_path / "model-00001-of-00002.gguf", REMOVAL, tmp_path / "out.gguf")

    assert largest(logits(tmp_path / "out.gguf"), hooked_logits(model, TOKENS, REMOVAL)) < PARITY
    assert not any(name.startswith("split.") for name in gguf.GGUFReader(tmp_path / "out.gguf").fields)


def split(model: Path, folder: Path) -> None:
    """The model in two parts, as gguf-split makes them."""
    reader = gguf.GGUFReader(model)
    half = len(reader.tensors) // 2
    for part, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        writer = gguf.GGUFWriter(folder / f"model-{part + 1:05}-of-00002.gguf", "llama")
        for field in reader.fields.values() if part == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                array = field.types[0] == gguf.GGUFValueType.ARRAY
                writer.add_key_value(
                    field.name, field.contents(), field.types[0], field.types[-1] if array else None
                )
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.gguf"
    output.write_text("what was there before")
    written = gguf.GGUFWriter.write_tensor_data
    calls = iter(range(5))

    def until_full(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(*arguments)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", until_full)
    with pytest.raises(OutputError, match="No space left on device"):
        merge(tiny_model("llama").gguf, REMOVAL, output)

    assert output.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [output]


def test_a_model_is_not_merged_into_its_own_file(tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(tiny_model("llama").gguf.read_bytes())
    with pytest.raises(OutputError, match="is the model itself"):
        merge(copy, REMOVAL, copy)
    assert copy.read_bytes() == tiny_model("llama").gguf.read_bytes()
