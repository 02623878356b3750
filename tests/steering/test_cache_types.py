"""Edits beside keys and values that are rounded, as people keep them: F16 and Q8_0, with flash attention.

PyTorch keeps them in float32, so a steered answer may be as far from it as an unsteered one is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.steering.steer import steer
from tests.models import EXPERTS_WITH_BIAS, TinyModel, tiny_model
from tests.runtime.context import Context, rows
from tests.runtime.gpu import same_bits, tolerance
from tests.runtime.oracle import hooked_logits
from tests.steering.asking import answer, cached, load, strengths

N_LAYER, N_EMBD = 3, 64
RNG = np.random.default_rng(0)
TOKENS = [int(token) for token in RNG.integers(5, 370, 40)]
EDITS = {
    layer: LayerEdit(remove=RNG.standard_normal((3, N_EMBD)), add=0.3 * RNG.standard_normal(N_EMBD))
    for layer in range(N_LAYER)
}
CACHES = {
    "F16 with flash attention": (llama_cpp.GGML_TYPE_F16, tolerance(0.02)),
    "Q8_0 with flash attention": (llama_cpp.GGML_TYPE_Q8_0, tolerance(0.2)),
}
"""How far the rounding may move an unsteered logit, whose standard deviation is 1."""


@cache
def model(architecture: str) -> TinyModel:
    # Q8_0 rounds blocks of 32, and a head has to fill whole ones.
    fields = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    if architecture == "gemma3":
        fields["query_pre_attn_scalar"] = 32
    if architecture == EXPERTS_WITH_BIAS:
        fields["num_experts_per_tok"] = 4  # all: rounding would choose others
    return tiny_model(architecture, n_layer=N_LAYER, n_embd=N_EMBD, **fields)


@pytest.fixture(params=CACHES)
def cache_type(request: pytest.FixtureRequest) -> tuple[int, float]:
    return CACHES[request.param]


@pytest.fixture(params=["llama", "gemma3", EXPERTS_WITH_BIAS])
def opened(
    request: pytest.FixtureRequest, cache_type: tuple[int, float]
) -> Iterator[tuple[TinyModel, Context, NDArray[np.float32], float]]:
    """A model, its context, its unsteered logits, and how far the rounding puts them from PyTorch."""
    tiny, (kind, rounding) = model(request.param), cache_type
    with Context(tiny.gguf, cache_type=kind, flash_attention=True) as context:
        base = context.logits(rows(TOKENS))
        floor = float(np.abs(base - hooked_logits(tiny, TOKENS, {})).max())
        assert 1e-5 < floor < rounding
        yield tiny, context, base, floor


Opened = tuple[TinyModel, Context, NDArray[np.float32], float]


def test_edits_are_as_near_to_forward_hooks_as_the_unsteered_model(opened: Opened) -> None:
    tiny, context, _, floor = opened
    context.set_edits(EDITS)
    for strength, first, end in ((1.0, 0, len(TOKENS)), (0.5, 7, 20)):
        context.set_strength(strength, first=first, end=end)

        steered = context.logits(rows(TOKENS))

        by_token = [strength if first <= position < end else 0.0 for position in range(len(TOKENS))]
        expected = hooked_logits(tiny, TOKENS, EDITS, by_token)
        difference = float(np.abs(steered - expected).max())
        assert difference < 3 * floor
        # An edit that is a fifth off is seen.
        fifth = hooked_logits(tiny, TOKENS, EDITS, [0.8 * s for s in by_token])
        assert np.abs(steered - fifth).max() > 2 * difference


def test_token_by_token_is_as_near_to_forward_hooks_as_the_unsteered_model(opened: Opened) -> None:
    tiny, context, _, floor = opened
    context.set_edits(EDITS)
    context.clear()

    steered = np.concatenate([context.decode([row]) for row in rows(TOKENS)])

    assert np.abs(steered - hooked_logits(tiny, TOKENS, EDITS)).max() < 3 * floor


def test_strength_zero_and_cleared_edits_are_the_unsteered_model_bit_for_bit(opened: Opened) -> None:
    _, context, base, _ = opened
    context.set_edits(EDITS)
    assert not same_bits(context.logits(rows(TOKENS)), base)

    context.set_strength(0.0)
    assert same_bits(context.logits(rows(TOKENS)), base)
    context.set_edits({})
    assert same_bits(context.logits(rows(TOKENS)), base)


def test_an_answer_is_steered_and_what_was_not_steered_is_kept(cache_type: tuple[int, float]) -> None:
    tiny, (kind, rounding) = model("llama"), cache_type
    llm = load(tiny.gguf, type_k=kind, type_v=kind, flash_attn=True)
    with steer(llm, ControlFile(ModelInfo.from_gguf(tiny.gguf), EDITS)):
        for prompt in (TOKENS[:24], TOKENS):  # which begins with the one before
            answer(llm, prompt)
            tokens, logits = cached(llm)
            expected = hooked_logits(
                tiny, tokens, EDITS, strengths("generation", 1.0, len(prompt), len(tokens))
            )
            assert np.abs(logits - expected).max() < 3 * rounding
    assert llm.n_tokens == len(TOKENS) - 1
    llm.close()
