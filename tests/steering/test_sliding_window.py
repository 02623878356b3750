"""Models whose layers attend to the last tokens only, with texts that are longer than the window and than
what is kept of it.

Without `swa_full`, llama.cpp overwrites what no token to come can see, and still says that the cache was cut
where it lies (`llama_kv_cache_iswa::seq_rm` in src/llama-kv-cache-iswa.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
from llama_cpp import Llama
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.steering.steer import steer
from tests.models import EXPERTS_WITH_BIAS, TinyModel, tiny_model
from tests.runtime.context import Context, Row, rows
from tests.runtime.gpu import same_bits
from tests.runtime.oracle import hooked_logits
from tests.steering.asking import MORE, answer, cached, load

WINDOW, PIECE = 16, 32
KEPT = 256
"""Cells of the cache of a window: llama.cpp rounds the window and a piece up to this."""
N_SHARED = 100
"""Tokens of the long text that the next one begins with: longer than the window, no longer in its cache."""
RNG = np.random.default_rng(0)
LONG = [int(token) for token in RNG.integers(5, 370, KEPT + N_SHARED + 2 * WINDOW)]
NEXT = LONG[:N_SHARED] + MORE
CLOSE = 1e-2
"""The GELU table of ggml holds halves, so that gemma's logits jump by thousandths; what is gone moves them by
whole numbers."""


@cache
def model(architecture: str) -> TinyModel:
    """With a layer of each kind: every sixth of gemma attends to all tokens, every second of gpt-oss."""
    return tiny_model(
        architecture, n_layer=6 if architecture == "gemma3" else 3, max_position_embeddings=1024
    )


def edits_of(tiny: TinyModel, seed: int = 0) -> dict[int, LayerEdit]:
    random = np.random.default_rng(seed).standard_normal
    return {
        layer: LayerEdit(remove=random((2, 64)), add=0.3 * random(64)) for layer in range(len(tiny.blocks))
    }


def small_window(architecture: str = "gemma3") -> Llama:
    options = {"n_ctx": 1024, "n_batch": PIECE, "n_ubatch": PIECE, "swa_full": False}
    return load(model(architecture).gguf, **options)


def control(architecture: str = "gemma3", seed: int = 0) -> ControlFile:
    tiny = model(architecture)
    return ControlFile(ModelInfo.from_gguf(tiny.gguf), edits_of(tiny, seed))


def fresh_logits(
    prompt: Sequence[int], *controls: tuple[ControlFile, str], architecture: str = "gemma3"
) -> tuple[list[int], NDArray[np.float32]]:
    """Of an answer to one prompt, the first that a model is asked."""
    llm = small_window(architecture)
    for one, scope in controls:
        steer(llm, one, scope=scope)
    answer(llm, prompt)
    found = cached(llm)
    llm.close()
    return found


def assert_as_fresh(
    llm: Llama, prompt: Sequence[int], *controls: tuple[ControlFile, str], architecture: str = "gemma3"
) -> None:
    answer(llm, prompt)
    tokens, logits = cached(llm)
    expected_tokens, expected = fresh_logits(prompt, *controls, architecture=architecture)
    assert np.abs(logits - expected)[: len(prompt)].max() < CLOSE
    assert tokens == expected_tokens
    assert np.abs(logits - expected).max() < CLOSE


@pytest.fixture
def llm() -> Iterator[Llama]:
    llm = small_window()
    yield llm
    llm.close()


@pytest.mark.parametrize("whole_window", [True, False], ids=["swa_full", "the window alone"])
@pytest.mark.parametrize("architecture", ["gemma3", EXPERTS_WITH_BIAS])
def test_edits_of_a_text_past_the_window_equal_forward_hooks(architecture: str, whole_window: bool) -> None:
    tiny = model(architecture)
    edits = edits_of(tiny)
    first, end = 50, len(LONG) - 20
    strengths = [0.0] * first + [0.7] * (end - first) + [0.0] * (len(LONG) - end)
    with Context(tiny.gguf, cells=1024, micro_batch=PIECE, whole_window=whole_window) as context:
        base = context.logits(rows(LONG))
        unsteered = hooked_logits(tiny, LONG, {})
        floor = np.abs(base - unsteered).max()
        context.set_edits(edits)
        context.set_strength(0.7, first=first, end=end)

        steered = context.logits(rows(LONG))
        context.set_strength(0.0)
        off = context.logits(rows(LONG))

    expected = hooked_logits(tiny, LONG, edits, strengths)
    assert np.abs(steered - expected).max() < max(5e-5, 2 * floor)
    assert floor < CLOSE
    # The last tokens see no steered token but through the layers that attend to all of them.
    assert np.abs(expected - unsteered)[-1].max() > 0.1
    assert np.array_equal(off, base)


def test_tokens_that_are_gone_from_the_window_are_missing_from_the_logits_after_a_cut() -> None:
    """What the tests below are about: llama.cpp says yes, and computes on without them."""
    tiny = model("gemma3")
    with Context(tiny.gguf, cells=1024, micro_batch=PIECE, whole_window=False) as context:
        expected = context.logits(rows(NEXT))[-len(MORE) :]
        context.logits(rows(LONG))
        assert context.truncate(N_SHARED)
        found = context.decode([Row(t, N_SHARED + i) for i, t in enumerate(MORE)])
    assert np.abs(found - expected).max() > 1


@pytest.mark.parametrize("scope", ["generation", "all", "first:2"])
def test_a_prompt_that_shares_more_than_the_window_with_the_one_before_is_answered_as_if_it_were_alone(
    llm: Llama, scope: str
) -> None:
    with steer(llm, control(), scope=scope):
        answer(llm, LONG)
        assert_as_fresh(llm, NEXT, (control(), scope))


def test_the_same_holds_in_a_model_of_which_every_second_layer_has_a_window() -> None:
    llm = small_window(EXPERTS_WITH_BIAS)
    with steer(llm, control(EXPERTS_WITH_BIAS)):
        answer(llm, LONG)
        assert_as_fresh(llm, NEXT, (control(EXPERTS_WITH_BIAS), "generation"), architecture=EXPERTS_WITH_BIAS)
    llm.close()


def test_a_prompt_that_is_repeated_at_another_strength_is_answered_as_if_it_were_alone(llm: Llama) -> None:
    with steer(llm, control(), scope="generation") as steering:
        for strength in (1.0, 0.0, 1.0):
            steering.strength = strength
            assert_as_fresh(llm, LONG, *([(control(), "generation")] if strength else []))


@pytest.mark.parametrize("scope", ["generation", "all"])
@pytest.mark.parametrize("prompt", [NEXT, LONG, LONG[: N_SHARED // 2]], ids=["next", "same", "shorter"])
def test_after_the_with_block_a_prompt_that_shares_more_than_the_window_is_answered_as_if_it_were_alone(
    llm: Llama, scope: str, prompt: list[int]
) -> None:
    with steer(llm, control(), scope=scope):
        answer(llm, LONG)
    assert_as_fresh(llm, prompt)


def test_where_one_of_two_controls_goes_the_other_steers_on_as_if_it_were_alone(llm: Llama) -> None:
    one, other = control(), control(seed=1)
    with steer(llm, one, scope="all"):
        with steer(llm, other, scope="generation"):
            answer(llm, NEXT)
            answer(llm, LONG)
        assert_as_fresh(llm, NEXT, (one, "all"))


def test_with_a_whole_window_what_is_kept_is_kept() -> None:
    """The mend costs nothing where nothing is gone."""
    tiny = model("gemma3")
    llm = load(tiny.gguf, n_ctx=1024, swa_full=True)
    with steer(llm, control()):
        answer(llm, LONG)
    assert llm.n_tokens == len(LONG) - 1
    llm.close()


def test_strength_zero_is_the_unsteered_model_bit_for_bit(llm: Llama) -> None:
    with steer(llm, control(), strength=0.0):
        answer(llm, LONG)
        assert same_bits(cached(llm)[1], fresh_logits(LONG)[1])
