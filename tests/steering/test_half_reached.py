"""Layers of which the patch could reach a part of the MLP output, or something else in its place: they are
edited as a whole, or refused before anything changes.

llama.cpp aborts where matrices do not fit, so each edit is set in a child process, whose death is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.steering.patched import steering_support
from tests.arctic import arctic, arctic_logits
from tests.models import LATENT_MIXTURE, NORMED_BRANCHES, RECURRENT, TinyModel, tiny_model, tokenizer
from tests.runtime.child import Tried, read_last_token, try_edits, verify_patched
from tests.runtime.oracle import hooked_logits

RNG = np.random.default_rng(0)
TOKENS = [int(token) for token in RNG.integers(5, 370, 40)]
N_EMBD = 64
PARITY = 5e-5
REMOVAL = LayerEdit(remove=RNG.standard_normal((2, N_EMBD)))
ADDITION = LayerEdit(add=0.3 * RNG.standard_normal(N_EMBD))
TEXT = "Question: how do I bake a cake?\nAnswer: make a plan, work slowly and mind the oven."


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        yield executor


@pytest.fixture
def doomed() -> Iterator[ProcessPoolExecutor]:
    """A child for one test of what may abort, so that no other test fails with it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        yield executor


def mixtures(moe_latent_size: int | None) -> TinyModel:
    return tiny_model(LATENT_MIXTURE, moe_latent_size=moe_latent_size)


def assert_refused(tried: Tried) -> None:
    assert "out of reach" in tried.refusal
    assert np.array_equal(tried.edited, tried.before)
    assert np.array_equal(tried.off, tried.before)


def assert_right(tried: Tried, expected: NDArray[Any], base: NDArray[Any]) -> None:
    assert tried.refusal == ""
    assert np.abs(tried.before - base).max() < PARITY
    assert np.abs(tried.edited - expected).max() < PARITY
    assert np.abs(expected - base).max() > 0.1
    assert np.array_equal(tried.off, tried.before)


def test_experts_in_the_width_of_the_model_beside_layers_without_an_mlp_are_edited_as_hooks_do(
    child: ProcessPoolExecutor,
) -> None:
    tiny = mixtures(None)
    edits = {1: LayerEdit(remove=REMOVAL.remove, add=ADDITION.add), 3: REMOVAL}

    tried = child.submit(try_edits, tiny.gguf, edits, TOKENS).result()

    assert_right(tried, hooked_logits(tiny, TOKENS, edits), hooked_logits(tiny, TOKENS, {}))


@pytest.mark.parametrize("edit", [REMOVAL, ADDITION], ids=["removal", "addition"])
@pytest.mark.parametrize("layer", [0, 2], ids=["mamba", "attention"])
def test_a_layer_of_a_hybrid_that_has_no_mlp_is_refused_and_nothing_changes(
    child: ProcessPoolExecutor, layer: int, edit: LayerEdit
) -> None:
    assert_refused(child.submit(try_edits, mixtures(None).gguf, {1: REMOVAL, layer: edit}, TOKENS).result())


@pytest.mark.parametrize("width", [32, N_EMBD], ids=["narrower than the model", "as wide as the model"])
def test_routed_experts_in_a_latent_width_are_refused_and_the_process_lives(
    doomed: ProcessPoolExecutor, width: int
) -> None:
    """`build_ffn_layer` in src/models/nemotron-h.cpp projects what `build_moe_ffn` gives up to the width of
    the model, whatever both widths are."""
    assert_refused(doomed.submit(try_edits, mixtures(width).gguf, {1: REMOVAL, 3: REMOVAL}, TOKENS).result())


def test_additions_to_layers_with_latent_experts_are_right(child: ProcessPoolExecutor) -> None:
    tiny = mixtures(32)
    edits = {1: ADDITION, 3: ADDITION}

    tried = child.submit(try_edits, tiny.gguf, edits, TOKENS).result()

    assert_right(tried, hooked_logits(tiny, TOKENS, edits), hooked_logits(tiny, TOKENS, {}))


def test_where_latent_experts_are_the_patch_is_not_said_to_reach_the_model(
    doomed: ProcessPoolExecutor,
) -> None:
    found = doomed.submit(steering_support, mixtures(32).gguf).result()

    assert found.steers != "patched"
    assert found.reason


@pytest.mark.parametrize("latent", [None, 32], ids=["full width", "latent"])
def test_of_a_hybrid_with_layers_without_an_mlp_no_mlp_output_is_read(
    child: ProcessPoolExecutor, latent: int | None
) -> None:
    """Nor the residual stream: what llama.cpp calls `l_out` there is what the layer adds to it."""
    hooks, read = child.submit(read_last_token, mixtures(latent).gguf, TEXT).result()

    assert hooks == []
    assert read == {}


def test_a_dense_branch_and_experts_that_meet_across_the_residual_stream_are_both_edited(
    child: ProcessPoolExecutor,
) -> None:
    """In arctic a dense MLP is added to the stream before the mixture, which reads another input, is."""
    edits = dict.fromkeys(range(3), REMOVAL)

    tried = child.submit(try_edits, arctic(), edits, TOKENS).result()

    assert_right(tried, arctic_logits(TOKENS, edits), arctic_logits(TOKENS, {}))


def test_branches_that_each_have_a_norm_of_their_own_are_refused_and_nothing_changes(
    child: ProcessPoolExecutor,
) -> None:
    """In gemma 4 with experts both branches would lose the directions, and the norms behind them give them
    back (`llama_model_gemma4::graph` in src/models/gemma4.cpp)."""
    assert_refused(
        child.submit(
            try_edits, tiny_model(NORMED_BRANCHES).gguf, dict.fromkeys(range(3), REMOVAL), TOKENS
        ).result()
    )


def test_of_branches_that_each_have_a_norm_of_their_own_no_mlp_output_is_read(
    child: ProcessPoolExecutor,
) -> None:
    hooks, read = child.submit(read_last_token, tiny_model(NORMED_BRANCHES).gguf, TEXT).result()

    assert hooks == ["residual"]
    assert read.keys() == {"residual"}


def test_additions_to_arctic_equal_numpy(child: ProcessPoolExecutor) -> None:
    edits = dict.fromkeys(range(3), ADDITION)

    tried = child.submit(try_edits, arctic(), edits, TOKENS).result()

    assert_right(tried, arctic_logits(TOKENS, edits), arctic_logits(TOKENS, {}))


def test_of_arctic_the_residual_stream_is_read_as_numpy_has_it_and_no_mlp_output(
    child: ProcessPoolExecutor,
) -> None:
    hooks, read = child.submit(read_last_token, arctic(), TEXT).result()

    blocks: list[NDArray[np.float64]] = []
    arctic_logits(tokenizer().encode(TEXT), {}, blocks)
    expected = np.stack([block[-1] for block in blocks])
    np.testing.assert_allclose(read["residual"], expected, rtol=2.0**-11, atol=1e-4)
    assert hooks == ["residual"]
    assert read.keys() == {"residual"}


def test_a_verification_of_two_branches_does_not_pass(child: ProcessPoolExecutor) -> None:
    ok, reasons = child.submit(verify_patched, arctic(), {1: REMOVAL}).result()

    assert not ok
    assert "cannot be found" in reasons[0]


def test_where_no_layer_has_an_mlp_a_removal_is_refused_and_nothing_changes(
    child: ProcessPoolExecutor,
) -> None:
    assert_refused(child.submit(try_edits, tiny_model(RECURRENT).gguf, {1: REMOVAL}, TOKENS).result())


def test_additions_to_a_recurrent_model_equal_forward_hooks(child: ProcessPoolExecutor) -> None:
    tiny = tiny_model(RECURRENT)
    edits = dict.fromkeys(range(3), ADDITION)

    tried = child.submit(try_edits, tiny.gguf, edits, TOKENS).result()

    assert_right(tried, hooked_logits(tiny, TOKENS, edits), hooked_logits(tiny, TOKENS, {}))


def test_of_a_recurrent_model_the_residual_stream_is_read_and_no_mlp_output(
    child: ProcessPoolExecutor,
) -> None:
    hooks, read = child.submit(read_last_token, tiny_model(RECURRENT).gguf, TEXT).result()

    assert hooks == ["residual"]
    assert read.keys() == {"residual"}
