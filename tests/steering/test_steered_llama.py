"""One object that is a steered `Llama`; the oracle is `steer` on a plain one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from alignez_gguf import ControlFile, LayerEdit, ModelInfo, SteeredLlama, demo, steer
from alignez_gguf.errors import ControlFileError, SteeringError

OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
PROMPT = "Human: How can I write a song?\nAssistant:"


@pytest.fixture(scope="module")
def control() -> ControlFile:
    info = ModelInfo.from_gguf(demo.MODEL)
    normal = np.random.default_rng(0).standard_normal
    return ControlFile(info, {2: LayerEdit(remove=normal((3, info.n_embd)), add=10 * normal(info.n_embd))})


@pytest.fixture
def steered(control: ControlFile) -> Iterator[SteeredLlama]:
    with SteeredLlama(demo.MODEL, control, strength=0.6, **OPTIONS) as llm:
        yield llm


def text(llm: Any) -> str:
    return str(llm(PROMPT, max_tokens=12, temperature=1.0, seed=3)["choices"][0]["text"])


def test_every_answer_is_that_of_a_steered_llama(steered: SteeredLlama, control: ControlFile) -> None:
    llm = Llama(str(demo.MODEL), verbose=False, **OPTIONS)
    plain = text(llm)
    with steer(llm, control, strength=0.6) as steering:
        assert text(steered) == text(llm) != plain
        steered.strength = steering.strength = 0.2
        assert steered.strength == 0.2
        assert text(steered) == text(llm)
    steered.strength = 0
    assert text(steered) == plain
    steered.steering.remove()
    assert text(steered) == plain
    llm.close()


def test_stream_adds_up_to_the_answer(steered: SteeredLlama) -> None:
    whole = text(steered)
    pieces = steered(PROMPT, max_tokens=12, temperature=1.0, seed=3, stream=True)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole


def test_closed_model_says_so(control: ControlFile) -> None:
    llm = SteeredLlama(demo.MODEL, control, **OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        llm.strength = 1


def test_model_is_closed_again_where_it_cannot_be_steered(control: ControlFile) -> None:
    with pytest.raises(SteeringError, match="negative"):
        SteeredLlama(demo.MODEL, control, strength=-1, **OPTIONS)
    with pytest.raises(ControlFileError):
        SteeredLlama(demo.MODEL, "missing.gguf", **OPTIONS)
