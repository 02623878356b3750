"""A verification finds what acts, and what does not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.runtime import bindings
from alignez_gguf.steering.stock_adapters import StockAdapters
from alignez_gguf.verification.rounding import EffectShare
from alignez_gguf.verification.verify import Verification, verify
from tests.models import ARCHITECTURES, OUT_OF_REACH, quantized, tiny_model

random = np.random.default_rng(0).standard_normal
EDITS = {
    0: LayerEdit(remove=random((1, 64))),
    1: LayerEdit(remove=random((3, 64)), add=0.3 * random(64)),
    2: LayerEdit(add=0.3 * random(64)),
}


def verified(
    architecture: str, runtime: str, edits: Mapping[int, LayerEdit] = EDITS, **config: bool
) -> Verification:
    gguf = tiny_model(architecture, **config).gguf
    return verify(gguf, ControlFile(ModelInfo.from_gguf(gguf), edits), runtime=runtime, n_threads=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("runtime", ["patched", "stock"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_that_acts_is_found_to_act_as_numpy_says(architecture: str, runtime: str) -> None:
    found = verified(architecture, runtime)

    assert found.ok
    assert found.runtime == runtime
    assert found.off_bit_identical
    for check in found.layers:
        assert check.error is not None
        assert check.error < 1e-5
        assert check.reason == ""
    assert found.text_steered != found.text_unsteered
    assert found.patched_stock_max_diff is not None
    assert found.patched_stock_max_diff < 0.02 < found.logits_change
    assert found.stock_holds
    assert found.floor is not None
    assert found.floor < 0.05


BOOSTS = {
    1: LayerEdit(remove=np.eye(2, 64), gain=[0.5, 5.0], bias=0.3 * random(64)),
    2: LayerEdit(bias=0.3 * random(64), add=0.3 * random(64)),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_boosts_and_biases_are_found_to_act_as_numpy_says(architecture: str) -> None:
    found = verified(architecture, "patched", BOOSTS)

    assert found.ok, found.reason
    for check in found.layers:
        assert check.error is not None
        assert check.error < 1e-5


def test_boosts_and_biases_of_the_stock_form_are_seen_through_the_scale_of_the_residual() -> None:
    for architecture in ("llama", "granite"):
        found = verified(architecture, "stock", BOOSTS)

        assert found.ok, found.reason
        for check in found.layers:
            assert check.error is not None
            assert check.error < 1e-5


def test_what_a_lora_leaves_of_a_bias_is_seen_at_the_end_of_the_block() -> None:
    found = verified("llama", "stock", {1: EDITS[1]}, mlp_bias=True)

    assert found.ok
    assert found.layers[0].error is not None
    assert found.layers[0].error < 1e-5


def test_an_architecture_out_of_reach_of_the_patch_is_reached_by_a_lora() -> None:
    patched, stock = (verified(OUT_OF_REACH, runtime) for runtime in ("patched", "stock"))

    assert [check.acts for check in patched.layers] == [False, False, True]
    assert "out of reach" in patched.layers[0].reason
    assert not patched.ok
    assert stock.ok


def test_an_edit_that_llama_cpp_ignores_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StockAdapters, "_set", lambda *_: None)

    found = verified("llama", "stock")

    assert not found.ok
    assert [check.acts for check in found.layers] == [False, False, False]
    assert all("llama models do not apply" in check.reason for check in found.layers)


def test_an_edit_that_llama_cpp_applies_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    set_strength = bindings.set_strength

    def too_much(context: object, strength: float, **where: int) -> None:
        set_strength(context, 1.5 * strength, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(bindings, "set_strength", too_much)

    found = verified("llama", "patched")

    assert not found.ok
    assert [check.error for check in found.layers] == pytest.approx([0.5, 0.5, 0.5], rel=1e-3)
    assert "50% of the edit away" in found.layers[0].reason


def test_an_off_that_is_not_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    set_strength = bindings.set_strength

    def never_off(context: object, strength: float, **where: int) -> None:
        set_strength(context, strength or 1e-3, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(bindings, "set_strength", never_off)

    found = verified("llama", "patched")

    assert not found.off_bit_identical
    assert not found.ok


QUANTIZED = [("Q8_0", 64), ("Q4_0", 64), ("Q4_1", 64), ("Q5_1", 256), ("Q4_K_M", 256)]


def verified_quantized(
    file_type: str, n_embd: int, edits: Mapping[int, LayerEdit], runtime: str = "patched"
) -> Verification:
    gguf = quantized(tiny_model("llama", n_embd=n_embd).gguf, file_type)
    return verify(gguf, ControlFile(ModelInfo.from_gguf(gguf), edits), runtime=runtime, n_threads=1)  # type: ignore[arg-type]


def clear(n_embd: int) -> dict[int, LayerEdit]:
    """Edits that change much."""
    draw = np.random.default_rng(1).standard_normal
    return {
        0: LayerEdit(remove=draw((n_embd // 8, n_embd))),
        2: LayerEdit(remove=draw((2, n_embd)), add=0.3 * draw(n_embd)),
    }


@pytest.mark.parametrize("runtime", ["patched", "stock"])
@pytest.mark.parametrize(("file_type", "n_embd"), QUANTIZED)
def test_an_edit_of_a_quantized_model_is_above_rounding(file_type: str, n_embd: int, runtime: str) -> None:
    found = verified_quantized(file_type, n_embd, clear(n_embd), runtime)

    assert found.ok, found.reason
    assert found.floor is not None
    assert 0 < found.floor < 0.2
    assert found.stock_holds
    assert found.patched_stock_share is not None
    assert found.patched_stock_share <= 2 * found.floor
    for check in found.layers:
        errors = [check.error, check.stock_error] if runtime == "patched" else [check.error]
        assert all(error is not None and error < 1e-5 for error in errors)


@pytest.mark.parametrize("length", [1e-3, 1e-4])
@pytest.mark.parametrize(("file_type", "n_embd"), QUANTIZED)
def test_an_edit_thousands_of_times_smaller_than_the_stream_is_lost_in_rounding(
    file_type: str, n_embd: int, length: float
) -> None:
    """It changes logits, by as much as rounding does; the residual stream of these models is about 1 wide."""
    direction = np.random.default_rng(1).standard_normal(n_embd)

    found = verified_quantized(file_type, n_embd, {1: LayerEdit(add=length * direction)})

    assert found.logits_change > 0
    assert not found.ok
    assert "not above rounding" in found.reason


def test_a_layer_that_is_lost_in_rounding_is_named_beside_others_that_act() -> None:
    inert = LayerEdit(add=1e-4 * np.random.default_rng(1).standard_normal(64))

    found = verified_quantized("Q8_0", 64, {**clear(64), 1: inert})

    assert {check.layer: check.acts for check in found.layers} == {0: True, 1: False, 2: True}
    assert "layers 1 do not act: its effect is not above rounding" in found.reason


def test_the_floor_is_what_edits_that_are_too_small_to_act_change() -> None:
    """Several of them, each of which makes other numbers fall to the other step of a rounding."""
    changes = []
    for seed in range(5):
        direction = np.random.default_rng(seed).standard_normal(256)
        found = verified_quantized("Q4_K_M", 256, {1: LayerEdit(add=1e-3 * direction)})
        changes.append(found.effect)

    assert found.rounding / 3 < np.median(changes) < 3 * found.rounding


def test_without_quantization_only_the_kv_cache_rounds() -> None:
    """It is kept in F16; an edit acts here that would be lost in a quantized model."""
    found = verified("llama", "patched", {1: LayerEdit(add=1e-2 * random(64))})

    assert found.ok
    assert found.rounding < 1e-3


@pytest.mark.parametrize(("file_type", "n_embd"), QUANTIZED)
def test_a_stock_form_that_is_off_is_found(
    file_type: str, n_embd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_strength = StockAdapters._set
    monkeypatch.setattr(StockAdapters, "_set", lambda self, strength: set_strength(self, 0.8 * strength))

    found = verified_quantized(file_type, n_embd, clear(n_embd))

    assert all(check.acts for check in found.layers)
    assert found.stock_holds is False
    assert not found.ok
    assert "the patched runtime holds, the stock form" in found.reason
    assert "in layer 0, llama.cpp computes something that is 20% of the edit away" in found.reason


def test_a_stock_form_that_is_off_in_its_logits_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer alone is right there, all of them together are not."""
    set_strength = StockAdapters._set

    def weaker_together(self: StockAdapters, strength: float) -> None:
        set_strength(self, 0.7 * strength if self._lora and self._adds else strength)

    monkeypatch.setattr(StockAdapters, "_set", weaker_together)

    found = verified_quantized("Q8_0", 64, clear(64))

    assert found.stock_holds is False
    assert "their logits differ by" in found.reason
    assert found.patched_stock_share is not None
    assert found.patched_stock_share > 0.1


def test_a_token_that_is_far_off_decides_nothing() -> None:
    lengths = np.array([1000.0, 1.0, 1.0, 2.0, 1.0])

    share = EffectShare.of(np.array([5000.0, 0.1, 0.2, 0.2, 0.1]), lengths)

    assert share == EffectShare(median=0.1, worst=5.0)


def test_a_share_of_nothing_is_large_and_finite() -> None:
    assert EffectShare.of(np.array([1.0, 0.0]), np.zeros(2)) == EffectShare(median=500.0, worst=1000.0)
