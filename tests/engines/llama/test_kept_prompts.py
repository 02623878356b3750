"""Prompts that an engine wrote after and keeps, since they will come again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignez_gguf.engines.base import GenerationRequest, Passage, Sampling
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.engines.llama.prefix_cache import PrefixCache
from alignez_gguf.readout import Readout
from tests.engines.llama.test_steering import random_edits
from tests.models import quantized, tiny_model

PROMPTS = [
    f"Question: how do I {action}?\nAnswer: make a plan, and mind the oven.\nQuestion: why?\nAnswer:"
    for action in ("pick a lock", "wash a dog", "sleep", "x")
]
RESPONSES = (" make a plan", " mind the oven")
READOUTS = [Readout("mlp"), Readout("residual")]
SAMPLING = Sampling(max_tokens=4, temperature=0.8)


def write(engine: LlamaEngine, strength: float = 0.0) -> None:
    """Write after all prompts, two at a time, so that they lie in several sequences."""
    list(engine.generate([GenerationRequest(prompt, 1, strength, True) for prompt in PROMPTS], SAMPLING))


def fits(engine: LlamaEngine) -> list[float]:
    passages = [Passage(prompt, response) for prompt in reversed(PROMPTS) for response in RESPONSES]
    return list(engine.response_logprobs(passages))


def measured(engine: LlamaEngine) -> list[Any]:
    """All that an engine says of prompts, in another order than they were written after."""
    prompts = PROMPTS[::-1]
    read = engine.activations(list(map(Passage, prompts)), READOUTS)
    return [np.stack(list(read)), fits(engine), np.stack(list(engine.next_token_logprobs(prompts)))]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def opened(path: Path, **how: Any) -> LlamaEngine:
    return LlamaEngine(path, **{"n_ctx": 256, "n_parallel": 2, "n_threads": 1, **how})


@pytest.fixture(scope="module")
def gguf() -> Path:
    return tiny_model("llama").gguf


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0"])
def test_what_is_measured_of_kept_prompts_is_the_same_to_the_bit(gguf: Path, file_type: str) -> None:
    path = gguf if file_type == "F32" else quantized(gguf, file_type)
    with opened(path) as engine:
        expected = measured(engine)
    with opened(path) as engine:
        write(engine)
        found = measured(engine)
    assert_same(found, expected)


def test_kept_prompts_are_not_computed_again(gguf: Path, batches: list[int]) -> None:
    with opened(gguf) as engine:
        write(engine)
        batches.clear()
        list(engine.next_token_logprobs(PROMPTS[::-1]))
        assert batches == [2] * len(PROMPTS)  # of each its last tokens, of which one alone is not computed
        batches.clear()
        fits(engine)
        # Of each response, what comes before it is there: its own tokens, and the last one of the prompt.
        assert max(batches) < 10
        assert len(batches) == len(PROMPTS) * len(RESPONSES)


def test_prompts_that_do_not_come_again_are_not_kept(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "add", None)
    with opened(gguf) as engine:
        list(engine.generate(list(map(GenerationRequest, PROMPTS)), SAMPLING))


@pytest.mark.parametrize("scope", ["all", "generation"])
def test_steered_prompts_are_neither_kept_nor_taken_from_what_is_kept(gguf: Path, scope: str) -> None:
    with opened(gguf) as engine:
        expected = measured(engine)
        engine.set_edits(random_edits(), scope)
        steered = np.stack(list(engine.next_token_logprobs(PROMPTS, 1.0)))
    with opened(gguf) as engine:
        engine.set_edits(random_edits(), scope)
        write(engine, strength=1.0)
        assert_same(measured(engine), expected)
        write(engine)
        np.testing.assert_array_equal(np.stack(list(engine.next_token_logprobs(PROMPTS, 1.0))), steered)


def test_models_with_a_second_cache_keep_nothing_and_say_the_same(batches: list[int]) -> None:
    path = tiny_model("gemma3").gguf  # of which most layers see the last 16 tokens
    with opened(path) as engine:
        expected = measured(engine)
    alone = list(batches)
    with opened(path) as engine:
        write(engine)
        batches.clear()
        found = measured(engine)
    assert batches == alone
    assert_same(found, expected)


@pytest.mark.parametrize("lost", ["file", "state"])
def test_prompt_that_is_lost_is_computed_again(
    gguf: Path, lost: str, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    with opened(gguf) as engine:
        expected = measured(engine)
    alone = list(batches)
    with opened(gguf) as engine:
        write(engine)
        find = PrefixCache.find
        broken = {"file": lambda *_: None, "state": lambda self, prompt: (find(self, prompt) or b"")[:-1]}
        monkeypatch.setattr(PrefixCache, "find", broken[lost])
        batches.clear()
        found = measured(engine)
    assert sum(batches) >= sum(alone)
    assert_same(found, expected)
