"""steer() without the patch: every answer equals what PyTorch with forward hooks computes for that request.

Holds with any llama.cpp, the patched one included.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Llama

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import OutputError, RuntimeUnavailableError, SteeringError
from alignez_gguf.exporters import stock as exported
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.runtime import bindings
from alignez_gguf.steering.steer import Runtime, steer
from tests.models import OUT_OF_REACH, TinyModel, tiny_model
from tests.runtime.oracle import hooked_logits
from tests.steering.asking import MORE, PARITY, PROMPT, answer, cached, load, strengths

random = np.random.default_rng(0).standard_normal
EDITS = {
    0: LayerEdit(remove=random((1, 64))),
    1: LayerEdit(remove=random((3, 64)), add=0.3 * random(64)),
    2: LayerEdit(add=0.3 * random(64)),
}
ADDS_AT_LAYER_0 = {0: LayerEdit(add=random(64))}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNEZ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def control(model: TinyModel) -> ControlFile:
    return ControlFile(ModelInfo.from_gguf(model.gguf), EDITS)


def assert_as_alone(model: TinyModel, llm: Llama, prompt: Sequence[int], scope: str, strength: float) -> None:
    """Ask, and hold the tokens and the logits of the whole request against PyTorch."""
    answered = answer(llm, prompt)
    tokens, logits = cached(llm)
    expected = hooked_logits(model, tokens, EDITS, strengths(scope, strength, len(prompt), len(tokens)))
    assert tokens == [*prompt, *answered[:-1]]
    assert np.abs(logits - expected).max() < PARITY
    assert np.array_equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("scope", ["generation", "all", "first:2"])
def test_every_scope_and_strength_equals_forward_hooks(
    model: TinyModel, llm: Llama, control: ControlFile, scope: str
) -> None:
    with steer(llm, control, scope=scope, runtime="stock") as steering:
        assert_as_alone(model, llm, PROMPT, scope, 1.0)
        steering.strength = 0.5
        assert_as_alone(model, llm, PROMPT + MORE, scope, 0.5)
        steering.strength = 0.0
        assert_as_alone(model, llm, MORE, scope, 0.0)
        steering.strength = 1.0
        steering.scope = "all"
        assert_as_alone(model, llm, PROMPT, "all", 1.0)


@pytest.mark.parametrize("scope", ["generation", "all"])
def test_off_and_removed_are_the_unsteered_model_bit_for_bit(
    model: TinyModel, llm: Llama, control: ControlFile, scope: str
) -> None:
    never_steered = load(model.gguf)
    expected = answer(never_steered, PROMPT), cached(never_steered)[1]
    never_steered.close()

    with steer(llm, control, scope=scope, runtime="stock") as steering:
        answer(llm, PROMPT)
        assert not np.array_equal(cached(llm)[1], expected[1])
        llm.reset()
        steering.strength = 0.0
        assert answer(llm, PROMPT) == expected[0]
        assert np.array_equal(cached(llm)[1], expected[1])
        steering.strength = 1.0
        answer(llm, MORE)
    llm.reset()

    assert answer(llm, PROMPT) == expected[0]
    assert np.array_equal(cached(llm)[1], expected[1])


def test_mixtures_of_experts_are_steered() -> None:
    mixture = tiny_model("qwen2moe")
    llm = load(mixture.gguf)
    with steer(llm, ControlFile(ModelInfo.from_gguf(mixture.gguf), EDITS), runtime="stock"):
        assert_as_alone(mixture, llm, PROMPT, "generation", 1.0)
    llm.close()


def test_a_removal_that_the_patch_cannot_reach_acts() -> None:
    apertus = tiny_model(OUT_OF_REACH)
    llm = load(apertus.gguf)
    with steer(llm, ControlFile(ModelInfo.from_gguf(apertus.gguf), EDITS), runtime="stock"):
        assert_as_alone(apertus, llm, PROMPT, "generation", 1.0)
    llm.close()


def test_auto_takes_the_adapters_where_the_patch_does_not_reach() -> None:
    apertus = tiny_model(OUT_OF_REACH)
    llm = load(apertus.gguf)
    with steer(llm, ControlFile(ModelInfo.from_gguf(apertus.gguf), EDITS)) as steering:
        assert steering.runtime == "stock"
        assert_as_alone(apertus, llm, PROMPT, "generation", 1.0)
    llm.close()


def test_auto_takes_the_adapters_where_the_patch_is_missing(
    model: TinyModel, llm: Llama, control: ControlFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    with steer(llm, control) as steering:
        assert steering.runtime == "stock"
        assert_as_alone(model, llm, PROMPT, "generation", 1.0)


def test_what_the_adapters_cannot_carry_is_refused_with_the_mend(
    model: TinyModel, llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = ControlFile(ModelInfo.from_gguf(model.gguf), ADDS_AT_LAYER_0)
    with pytest.raises(SteeringError, match=r"adds at layer 0.*--layers 1-"):
        steer(llm, control, runtime="stock")
    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    with pytest.raises(
        RuntimeUnavailableError, match=r"lacks the steering patch.*alignez-gguf runtime build"
    ):
        steer(llm, control)
    assert "_alignez_steering" not in vars(llm)


@pytest.mark.parametrize(("first", "second"), [("stock", "auto"), ("stock", "stock"), ("patched", "stock")])
def test_a_second_control_is_refused_with_the_mend_and_the_first_one_stays(
    model: TinyModel, llm: Llama, control: ControlFile, first: Runtime, second: Runtime
) -> None:
    with steer(llm, control, runtime=first):
        with pytest.raises(SteeringError, match=r"one control at a time.*alignez-gguf runtime build"):
            steer(llm, control, runtime=second)
        assert_as_alone(model, llm, PROMPT, "generation", 1.0)


def test_the_adapters_are_made_once_for_a_file_and_edits(
    llm: Llama, control: ControlFile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steer(llm, control, runtime="stock").remove()
    (kept,) = (cache / "adapters").iterdir()
    monkeypatch.setattr(exported, "write_lora", lambda *_: pytest.fail("made again"))

    with steer(llm, control, runtime="stock"):
        first = answer(llm, PROMPT)

    assert first != answer(llm, PROMPT)
    assert list((cache / "adapters").iterdir()) == [kept]


def test_other_edits_and_other_models_get_adapters_of_their_own(
    model: TinyModel, llm: Llama, cache: Path
) -> None:
    other = tiny_model("llama", seed=1)
    other_llm = load(other.gguf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one, gguf in ((llm, model.gguf), (other_llm, other.gguf)):
            for edits in (EDITS, {1: LayerEdit(remove=random(64))}):
                steer(one, ControlFile(ModelInfo.from_gguf(gguf), edits), runtime="stock").remove()
    other_llm.close()

    assert len(list((cache / "adapters").iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_named(
    llm: Llama, control: ControlFile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(OutputError, match="ALIGNEZ_CACHE_DIR"):
        steer(llm, control, runtime="stock")


def test_a_model_whose_file_is_gone_is_refused(
    model: TinyModel, control: ControlFile, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.gguf.read_bytes())
    llm = load(copy)
    copy.unlink()
    with pytest.raises(SteeringError, match=r"made from the model's file.*copy\.gguf"):
        steer(llm, control, runtime="stock")
    llm.close()


def test_a_model_with_a_lora_of_its_own_is_refused(
    model: TinyModel, control: ControlFile, tmp_path: Path
) -> None:
    (lora, _) = exported.write(control, ModelWeights(model.gguf), tmp_path / "own.gguf")
    llm = load(model.gguf, lora_path=str(lora))
    with pytest.raises(SteeringError, match="LoRA of its own"):
        steer(llm, control, runtime="stock")
    llm.close()


def test_a_model_may_be_closed_while_it_is_steered(model: TinyModel, control: ControlFile) -> None:
    llm = load(model.gguf)
    with steer(llm, control, runtime="stock") as steering:
        answer(llm, PROMPT)
        llm.close()
        with pytest.raises(SteeringError, match="closed"):
            steering.strength = 0.5
