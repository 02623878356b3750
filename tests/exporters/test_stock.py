"""The stock forms, loaded by llama.cpp, against PyTorch with forward hooks on the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit, orthonormal_rows
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import ModelFileError, SteeringError
from alignez_gguf.exporters import stock
from alignez_gguf.exporters.weights import ModelWeights
from tests.exporters.adapted import adapters, logits, written
from tests.models import ARCHITECTURES, OUT_OF_REACH, TinyModel, quantized, tiny_model
from tests.runtime.context import Context, rows
from tests.runtime.oracle import hooked_logits

N_EMBD, N_LAYER = 64, 3
RNG = np.random.default_rng(0)
TOKENS = [int(token) for token in RNG.integers(5, 380, 40)]
PARITY = 5e-5
"""Largest difference to PyTorch; both sum in float32, in another order."""
BIASED = {
    "llama": {"mlp_bias": True},
    "granite": {"mlp_bias": True},
}


def vectors(rank: int) -> NDArray[np.float32]:
    return RNG.standard_normal((rank, N_EMBD)).astype(np.float32)


EDITS = {
    0: LayerEdit(remove=vectors(1)),
    1: LayerEdit(remove=vectors(3), add=0.3 * vectors(1)[0]),
    2: LayerEdit(remove=vectors(2), add=0.3 * vectors(1)[0]),
}


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def assert_equals_hooks(model: TinyModel, edits: dict[int, LayerEdit], folder: Path) -> list[Path]:
    files = written(model.gguf, edits, folder)
    base = hooked_logits(model, TOKENS, {})
    with Context(model.gguf) as context:
        loaded = adapters(context, files)
        floor = difference(logits(context, loaded, TOKENS, 0.0), base)
        for strength in (1.0, 0.5):
            expected = hooked_logits(model, TOKENS, edits, strength)
            got = logits(context, loaded, TOKENS, strength)
            # The GELU table of ggml holds halves, so gemma is as far from PyTorch without an edit.
            assert difference(got, expected) < max(PARITY, 2 * floor)
            assert difference(expected, base) > 0.1
    return files


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, OUT_OF_REACH])
def test_both_forms_together_equal_forward_hooks(architecture: str, tmp_path: Path) -> None:
    files = assert_equals_hooks(tiny_model(architecture), EDITS, tmp_path)

    assert [path.name for path in files] == ["out.lora.gguf", "out.cvec.gguf"]


BOOSTS = {
    0: LayerEdit(remove=orthonormal_rows(vectors(2)), gain=[0.5, 5.0]),
    1: LayerEdit.about(vectors(3), 0.3 * vectors(1)[0], 1.0),
    2: LayerEdit(bias=0.3 * vectors(1)[0], add=0.3 * vectors(1)[0]),
}
POST_NORM = ("gemma2", "gemma3", "olmo2")


@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one not in POST_NORM])
def test_boosts_about_a_centre_and_biases_equal_forward_hooks(architecture: str, tmp_path: Path) -> None:
    assert_equals_hooks(tiny_model(architecture), BOOSTS, tmp_path)


@pytest.mark.parametrize(("architecture", "config"), BIASED.items(), ids=BIASED)
def test_boosts_of_a_bias_equal_forward_hooks(
    architecture: str, config: dict[str, bool], tmp_path: Path
) -> None:
    edits = {layer: BOOSTS[layer] for layer in (1, 2)}
    assert_equals_hooks(tiny_model(architecture, **config), edits, tmp_path)


@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one in POST_NORM])
def test_bias_before_a_norm_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="a norm behind it"):
        written(tiny_model(architecture).gguf, {1: BOOSTS[1]}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M"])
def test_boosts_of_a_quantized_model_are_what_the_patch_computes(file_type: str, tmp_path: Path) -> None:
    model = quantized(tiny_model("llama", n_embd=256).gguf, file_type)
    # In the last layer: behind others, activations are rounded again.
    edits = {2: LayerEdit.about(RNG.standard_normal((2, 256)), 0.3 * RNG.standard_normal(256), 1.0)}
    with Context(model) as context:
        base = context.logits(rows(TOKENS))
        loaded = adapters(context, written(model, edits, tmp_path))
        stock_logits = logits(context, loaded, TOKENS, 1.0)
        loaded.detach()
        context.set_edits(edits)
        patched = context.logits(rows(TOKENS))
    assert difference(stock_logits, patched) < 0.01 * difference(patched, base)


@pytest.mark.parametrize(("architecture", "config"), BIASED.items(), ids=BIASED)
def test_the_control_vector_carries_what_removal_takes_from_a_bias(
    architecture: str, config: dict[str, bool], tmp_path: Path
) -> None:
    model = tiny_model(architecture, **config)
    removal_only = {layer: LayerEdit(remove=vectors(2)) for layer in (1, 2)}

    files = assert_equals_hooks(model, removal_only, tmp_path)

    assert [path.name for path in files] == ["out.lora.gguf", "out.cvec.gguf"]


@pytest.mark.parametrize("form", ["lora", "cvec"])
def test_only_the_form_that_is_needed_is_written(form: str, tmp_path: Path) -> None:
    edit = LayerEdit(remove=vectors(1)) if form == "lora" else LayerEdit(add=vectors(1)[0])

    files = assert_equals_hooks(tiny_model("llama"), {1: edit}, tmp_path)

    assert [path.name for path in files] == [f"out.{form}.gguf"]
    assert sorted(tmp_path.iterdir()) == files


def test_strength_zero_is_the_unsteered_model_bit_for_bit(tmp_path: Path) -> None:
    gguf_path = tiny_model("llama").gguf
    with Context(gguf_path) as context:
        base = context.logits(rows(TOKENS))
        loaded = adapters(context, written(gguf_path, EDITS, tmp_path))
        steered = logits(context, loaded, TOKENS, 1.0)

        off = logits(context, loaded, TOKENS, 0.0)
        again = logits(context, loaded, TOKENS, 1.0)
        loaded.detach()
        detached = context.logits(rows(TOKENS))

    assert difference(steered, base) > 0.1
    assert np.array_equal(off, base)
    assert np.array_equal(again, steered)
    assert np.array_equal(detached, base)


REFUSED = {
    "an addition at layer 0": ({}, {0: LayerEdit(add=vectors(1)[0])}, "adds at layer 0"),
    "a bias at layer 0": ({}, {0: LayerEdit(bias=vectors(1)[0])}, "adds at layer 0"),
    "the bias of layer 0": ({"mlp_bias": True}, {0: LayerEdit(remove=vectors(1))}, "layer 0 has a bias"),
}


@pytest.mark.parametrize(("config", "edits", "message"), REFUSED.values(), ids=REFUSED)
def test_what_stock_cannot_carry_is_refused_with_the_mend_and_nothing_is_written(
    config: dict[str, bool], edits: dict[int, LayerEdit], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SteeringError, match=message) as refusal:
        written(tiny_model("llama", **config).gguf, edits, tmp_path)

    assert "--layers 1-" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_type_that_no_lora_meets_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantization of a later llama.cpp, say."""
    monkeypatch.setattr("alignez_gguf.exporters.stacked._CARRIERS", {"Q5_1": ("Q4_1", "Q5_1")})
    model = quantized(tiny_model("llama").gguf, "Q8_0")

    with pytest.raises(SteeringError, match=r"blk\.1\.ffn_down\.weight: .* Q8_0.*--format merged"):
        written(model, {1: LayerEdit(remove=vectors(1))}, tmp_path)

    assert not list(tmp_path.iterdir())


def test_a_model_without_ffn_down_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"blk.0.ffn_up.weight": np.zeros((128, N_EMBD), np.float32)})

    with pytest.raises(SteeringError, match=r"layer 0 .* has no ffn_down weight"):
        stock.lora({0: LayerEdit(remove=vectors(1))}, ModelWeights(path))


def write_gguf(path: Path, tensors: dict[str, NDArray[np.float32]], **split: int) -> None:
    """A file that only says what it is, with these tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(2)
    for key, value in split.items():
        writer.add_uint16(f"split.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_weights_of_a_split_model_are_found_in_all_parts(tmp_path: Path) -> None:
    down = [RNG.standard_normal((N_EMBD, 128)).astype(np.float32) for _ in range(2)]
    for part, weight in enumerate(down):
        write_gguf(
            tmp_path / f"model-{part + 1:05}-of-00002.gguf",
            {f"blk.{part}.ffn_down.weight": weight},
            no=part,
            count=2,
        )
    v = vectors(2)
    edits = {layer: LayerEdit(remove=v) for layer in (0, 1)}

    pairs = stock.lora(edits, ModelWeights(tmp_path / "model-00001-of-00002.gguf"))

    for layer, weight in enumerate(down):
        removed = edits[layer].remove
        assert removed is not None
        pair = pairs[f"blk.{layer}.ffn_down.weight"]
        assert np.abs(pair.b @ pair.a + removed.T @ removed @ weight).max() < 1e-5


def test_a_missing_part_of_a_split_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    write_gguf(path, {"blk.0.ffn_down.weight": np.zeros((N_EMBD, 128), np.float32)}, no=0, count=2)

    with pytest.raises(ModelFileError, match=r"model-00002-of-00002\.gguf"):
        ModelWeights(path)


def test_the_command_line_names_every_file(tmp_path: Path) -> None:
    files = [tmp_path / "my out.lora.gguf", tmp_path / "my out.cvec.gguf"]

    line = stock.command_line(Path("model.gguf"), files)

    assert line == (f"llama-server -m model.gguf --lora '{files[0]}' --control-vector '{files[1]}'")


def test_equal_edits_give_equal_bytes(tmp_path: Path) -> None:
    model = ModelWeights(tiny_model("llama").gguf)
    for name in ("a", "b"):
        stock.write(ControlFile(ModelInfo.from_gguf(model.path), EDITS), model, tmp_path / name)

    for form in ("lora", "cvec"):
        assert (tmp_path / f"a.{form}.gguf").read_bytes() == (tmp_path / f"b.{form}.gguf").read_bytes()
