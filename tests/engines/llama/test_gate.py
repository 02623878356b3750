"""The engine behind a gate: which requests are steered depends on their own prompt alone."""

from __future__ import annotations

import numpy as np
import pytest

from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.gate import Gate
from alignez_gguf.engines.base import GenerationRequest
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import SteeringError
from tests.engines.llama.test_steering import PROMPTS, completed, random_edits
from tests.models import quantized, tiny_model

RANDOM = np.random.default_rng(4)
TOKENS = RANDOM.permutation(300)[:40].astype(np.int32)
WEIGHTS = RANDOM.normal(size=40).astype(np.float32)
REQUESTS = [
    GenerationRequest(prompt, seed, strength)
    for prompt in PROMPTS
    for seed in (1, 2)
    for strength in (0.0, 1.0)
]


def gates(engine: LlamaEngine) -> list[tuple[Gate, list[bool]]]:
    """Gates that open for none, for some and for all prompts, and for which."""
    scores = [Gate(TOKENS, WEIGHTS, 0.0).score(row) for row in engine.next_token_logprobs(PROMPTS)]
    low, middle, high = sorted(scores)
    return [
        (Gate(TOKENS, WEIGHTS, threshold), [score > threshold for score in scores])
        for threshold in (low - 1, (low + middle) / 2, (middle + high) / 2, high + 1)
    ]


@pytest.mark.parametrize("scope", ["generation", "all", "first:3"])
def test_open_requests_are_steered_and_closed_ones_are_the_base_model(
    engine: LlamaEngine, scope: str
) -> None:
    known = gates(engine)
    engine.set_edits({})
    plain = completed(engine, [GenerationRequest(one.prompt, one.seed) for one in REQUESTS])
    engine.set_edits(random_edits(), scope)
    steered = completed(engine, REQUESTS)
    for gate, opens in known:
        engine.set_edits(random_edits(), scope, gate)
        found = completed(engine, REQUESTS)
        for index, request in enumerate(REQUESTS):
            is_open = opens[PROMPTS.index(request.prompt)]
            assert found[index] == (steered if is_open else plain)[index]
            assert found[index].steered == (is_open and request.strength > 0)
    assert all(one != other for one, other in zip(plain[1::2], steered[1::2], strict=True))


def test_neighbours_change_nothing(engine: LlamaEngine) -> None:
    gate, opens = gates(engine)[1]
    assert {True, False} == set(opens)
    engine.set_edits(random_edits(), "generation", gate)
    together = completed(engine, REQUESTS)
    for request, expected in zip(REQUESTS, together, strict=True):
        engine.set_edits(random_edits(), "generation", gate)
        assert completed(engine, [request]) == [expected]


def test_closed_gate_is_the_base_model_where_weights_round() -> None:
    """With K-quants a prompt in two pieces rounds otherwise: it is computed as without an edit."""
    with LlamaEngine(quantized(tiny_model("llama", n_embd=256).gguf, "Q4_K_M"), n_threads=1) as engine:
        requests = [GenerationRequest(prompt, 3, 1.0) for prompt in PROMPTS]
        plain = completed(engine, [GenerationRequest(prompt, 3) for prompt in PROMPTS])
        closed, _ = gates(engine)[-1]
        normal = RANDOM.standard_normal
        engine.set_edits({1: LayerEdit(remove=normal((2, 256)))}, "generation", closed)
        assert completed(engine, requests) == plain


def test_new_edits_forget_the_gate(engine: LlamaEngine) -> None:
    requests = [GenerationRequest(prompt, 3, 1.0) for prompt in PROMPTS]
    engine.set_edits(random_edits())
    steered = completed(engine, requests)
    closed, _ = gates(engine)[-1]
    engine.set_edits(random_edits(), "generation", closed)
    assert completed(engine, requests) != steered
    engine.set_edits(random_edits())
    assert completed(engine, requests) == steered


def test_next_token_is_the_first_of_an_answer(engine: LlamaEngine) -> None:
    gate, opens = gates(engine)[1]
    plain = list(engine.next_token_logprobs(PROMPTS))
    engine.set_edits(random_edits())
    steered = list(engine.next_token_logprobs(PROMPTS, 1.0))
    engine.set_edits(random_edits(), "generation", gate)
    for index, found in enumerate(engine.next_token_logprobs(PROMPTS, 1.0)):
        np.testing.assert_array_equal(found, (steered if opens[index] else plain)[index])


def test_gate_of_another_vocabulary_changes_nothing(engine: LlamaEngine) -> None:
    requests = [GenerationRequest(prompt, 3, 1.0) for prompt in PROMPTS]
    engine.set_edits(random_edits())
    steered = completed(engine, requests)
    with pytest.raises(SteeringError, match="made for this model"):
        engine.set_edits({}, "generation", Gate(TOKENS + np.int32(100_000), WEIGHTS, 0.0))
    assert completed(engine, requests) == steered
