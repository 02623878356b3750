"""SteeredPrompts against PyTorch with forward hooks that edit each token at its own strength."""

from __future__ import annotations

import errno
import io
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alignez_gguf.edits import Edits, LayerEdit
from alignez_gguf.engines import steered
from alignez_gguf.engines.steered import SteeredPrompts, log_softmax
from alignez_gguf.errors import QueryError, WorkDirectoryError
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.scope import Scope
from alignez_gguf.scoring import ANSWER_TOKENS, DIVERGENCE_QUERIES, Divergence, Limits, Steering
from tests.models import TinyModel, tiny_model
from tests.runtime.oracle import hooked_logits

PARITY = 5e-5
"""Largest difference to PyTorch in log-probability, with keys and values in F32."""
PARITY_F16 = 2e-2
"""With keys and values in F16, as users have them: 11 bits of each are left."""

FEW_SHOT = "Question: how do I bake a cake?\nAnswer: make a plan.\n"
PROMPTS = [
    f"{FEW_SHOT}Question: how do I pick a lock?\nAnswer:",
    f"{FEW_SHOT}Question: how do I wash a dog?\nAnswer:",
    f"{FEW_SHOT}Question: why?\nAnswer:",
    "The quick brown fox",
    f"{FEW_SHOT}Question: how do I pick a lock?\nAnswer:",
]
HELPFUL = [" make a plan", "", " work slowly and mind the oven", " in the warm sun", " sorry"]
BASE = [" sorry, that is not something", " with the oven", "", " jumps over the lazy dog", " work slowly"]


def random_edits(seed: int, n_layer: int = 3, n_embd: int = 64) -> Edits:
    normal = np.random.default_rng(seed).standard_normal
    return {
        layer: LayerEdit(remove=normal((2, n_embd)), add=0.2 * normal(n_embd)) for layer in range(n_layer)
    }


EDITS = random_edits(0)
FEWER = {1: LayerEdit(remove=random_edits(1)[1].remove)}


@pytest.fixture(scope="module")
def torch_model() -> Iterator[TinyModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_model("llama")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(torch_model: TinyModel) -> Iterator[Model]:
    with Model(torch_model.gguf) as model:
        yield model


@pytest.fixture
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in F32, and no flash attention, which would round them to F16."""
    default = llama_cpp.llama_context_default_params

    def parameters() -> llama_cpp.llama_context_params:
        chosen = default()
        chosen.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return chosen

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", parameters)
    monkeypatch.setattr(steered, "Context", partial(Context, f32_cache=True))


@pytest.fixture
def prompts(model: Model, _full_precision: None) -> Iterator[SteeredPrompts]:
    with SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1) as prompts:
        yield prompts


def expected_logprobs(
    torch_model: TinyModel,
    tokens: list[int],
    n_prompt: int,
    edits: Edits,
    strength: float = 1.0,
    scope: str = "generation",
) -> NDArray[np.float64]:
    """[rows, n_vocab] from the last prompt token on."""
    edited = {
        "generation": range(n_prompt - 1, len(tokens)),
        "all": range(len(tokens)),
        "first:1": range(n_prompt - 1, n_prompt),
        "first:3": range(n_prompt - 1, n_prompt + 2),
    }[scope]
    strengths = [strength if position in edited else 0.0 for position in range(len(tokens))]
    logits = hooked_logits(torch_model, tokens, edits, strengths)[n_prompt - 1 :].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def expected_first(
    torch_model: TinyModel, model: Model, edits: Edits, strength: float = 1.0, scope: str = "generation"
) -> NDArray[np.float64]:
    tokens = [model.tokenize(prompt) for prompt in PROMPTS]
    return np.stack(
        [expected_logprobs(torch_model, prompt, len(prompt), edits, strength, scope)[0] for prompt in tokens]
    )


def expected_divergence(
    torch_model: TinyModel,
    model: Model,
    edits: Edits,
    prompts: list[str],
    base: list[str],
    helpful: list[str],
    scope: str = "generation",
) -> tuple[float, float]:
    """Mean over all tokens of the base answers; mean over the helpful ones of the sum after the first."""

    def along(answers: list[str]) -> Iterator[NDArray[np.float64]]:
        for prompt, answer in zip(prompts, answers, strict=True):
            n_prompt = len(model.tokenize(prompt))
            tokens = model.tokenize(prompt + answer)[: n_prompt + ANSWER_TOKENS]
            plain = expected_logprobs(torch_model, tokens, n_prompt, {})
            changed = expected_logprobs(torch_model, tokens, n_prompt, edits, scope=scope)
            yield (np.exp(plain) * (plain - changed)).sum(axis=1)

    after_first = np.mean([divergences[1:].sum() for divergences in along(helpful)])
    return float(np.concatenate(list(along(base))).mean()), float(after_first)


def figures(divergence: Divergence) -> tuple[float, float]:
    assert divergence.is_whole
    return divergence.per_token, divergence.after_first


@pytest.mark.parametrize("edits", [EDITS, FEWER, {}], ids=["all layers", "one layer", "no edit"])
def test_first_token_is_that_of_pytorch_edited_at_the_last_prompt_token(
    prompts: SteeredPrompts, torch_model: TinyModel, model: Model, edits: Edits
) -> None:
    (found,) = prompts.first_token_logprobs([Steering(edits)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected_first(torch_model, model, edits), atol=PARITY)


def test_first_token_with_the_cache_that_users_have(torch_model: TinyModel, model: Model) -> None:
    with SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1) as prompts:
        (found,) = prompts.first_token_logprobs([Steering(EDITS)])
    np.testing.assert_allclose(found, expected_first(torch_model, model, EDITS), atol=PARITY_F16)


STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
"""More than are computed together."""


def at(edits: Edits, strengths: Sequence[float]) -> list[Steering]:
    return [Steering(edits, strength) for strength in strengths]


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize("scope", ["generation", "all", "first:1", "first:3"])
def test_strengths_and_time_steps_are_those_of_pytorch(
    model: Model, torch_model: TinyModel, scope: str
) -> None:
    steered = Scope.parse(scope)
    with SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1) as prompts:
        for edits in (EDITS, FEWER):
            found = prompts.first_token_logprobs(at(edits, STRENGTHS), scope=steered)
            expected = [expected_first(torch_model, model, edits, strength, scope) for strength in STRENGTHS]
            np.testing.assert_allclose(found, np.stack(expected), atol=PARITY)
            measured = figures(prompts.divergence(edits, scope=steered))
            assert measured == pytest.approx(
                expected_divergence(torch_model, model, edits, PROMPTS, BASE, HELPFUL, scope), rel=1e-3
            )
        np.testing.assert_array_equal(
            prompts.first_token_logprobs(at(EDITS, (0.0,)), scope=steered),
            prompts.first_token_logprobs([Steering({})], scope=steered),
        )


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize("scope", ["generation", "all", "first:1"])
def test_several_edits_together_do_not_act_on_each_other(
    model: Model, torch_model: TinyModel, scope: str
) -> None:
    edits = [EDITS, random_edits(5), {}, FEWER, FEWER, EDITS, random_edits(6), FEWER]
    steerings = list(map(Steering, edits, (1.0, 0.5, 1.0, 2.0, 1.0, 0.25, 1.0, 0.0)))
    steered = Scope.parse(scope)
    with SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1) as prompts:
        found = prompts.first_token_logprobs(steerings, scope=steered)
        again = prompts.first_token_logprobs(steerings, scope=steered)
        alone = [prompts.first_token_logprobs([one], scope=steered)[0] for one in steerings]
    expected = [expected_first(torch_model, model, edits, strength, scope) for edits, strength in steerings]
    np.testing.assert_allclose(found, np.stack(expected), atol=PARITY)
    np.testing.assert_allclose(found, np.stack(alone), atol=PARITY)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("scope", ["generation", "all", "first:2"])
def test_strengths_computed_together_give_the_same_bits_again_whatever_was_steered_before(
    model: Model, scope: str
) -> None:
    def measured(*before: Edits) -> NDArray[np.float32]:
        with SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1) as prompts:
            for edits, other in itertools.product(before, map(Scope.parse, ("all", "generation"))):
                prompts.first_token_logprobs(at(edits, (0.5, 1.0)), scope=other)
                prompts.divergence(edits, scope=other)
            return prompts.first_token_logprobs(at(EDITS, STRENGTHS), scope=Scope.parse(scope))

    np.testing.assert_array_equal(measured(), measured(FEWER, random_edits(3)))


@pytest.mark.parametrize("edits", [EDITS, FEWER], ids=["all layers", "one layer"])
def test_divergence_is_that_over_all_answer_tokens_and_what_follows(
    prompts: SteeredPrompts, torch_model: TinyModel, model: Model, edits: Edits
) -> None:
    expected = expected_divergence(torch_model, model, edits, PROMPTS, BASE, HELPFUL)
    assert min(expected) > 1e-3
    assert figures(prompts.divergence(edits)) == pytest.approx(expected, rel=1e-3)


def test_divergence_over_the_limit_ends_and_leaves_no_trace(model: Model, batches: list[int]) -> None:
    many = [f"{FEW_SHOT}Question: what is {number}?\nAnswer:" for number in range(DIVERGENCE_QUERIES)]
    answers = [" make a plan and mind the oven" * 4] * len(many)
    with SteeredPrompts(model, many, answers, answers, n_threads=1) as prompts:
        whole = prompts.divergence(EDITS)
        for limits, answers_together in [
            (Limits(after_first=whole.after_first / 30), [1]),
            (Limits(per_token=whole.per_token / 30), [1, 1]),
            (Limits(1.01 * whole.per_token, 1.01 * whole.after_first), [1, 1, 2, 5, 5, 5, 5] * 2),
        ]:
            batches.clear()
            assert prompts.divergence(EDITS, limits) == whole.within(limits)
            assert sorted(batches) == sorted((1 + ANSWER_TOKENS) * n for n in answers_together)
            assert prompts.divergence(EDITS) == whole


def test_base_does_not_diverge_from_itself(prompts: SteeredPrompts) -> None:
    assert figures(prompts.divergence({})) == pytest.approx((0, 0), abs=1e-6)


def test_full_disk_is_an_error_that_names_the_folder(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    contexts = []

    def opened(*args: Any, **keywords: Any) -> Context:
        contexts.append(Context(*args, **keywords))
        return contexts[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    monkeypatch.setattr(steered, "Context", opened)
    with pytest.raises(WorkDirectoryError, match=r"No space left on device; make room there, or set TMPDIR"):
        SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1)
    (context,) = contexts
    with pytest.raises(ValueError, match="closed"):
        context.pointer  # noqa: B018


def test_figures_do_not_depend_on_what_was_measured_before(prompts: SteeredPrompts, model: Model) -> None:
    first = prompts.first_token_logprobs([Steering(EDITS)])
    divergence = prompts.divergence(EDITS)
    base = prompts.first_token_logprobs([Steering({})])
    prompts.divergence(FEWER)
    prompts.first_token_logprobs([Steering(random_edits(7))])

    with SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1) as fresh:
        np.testing.assert_array_equal(fresh.first_token_logprobs([Steering({})]), base)
    assert prompts.divergence(EDITS) == divergence
    np.testing.assert_array_equal(prompts.first_token_logprobs([Steering({})]), base)
    np.testing.assert_array_equal(prompts.first_token_logprobs([Steering(EDITS)]), first)


@pytest.mark.usefixtures("_full_precision")
def test_answers_that_are_computed_together(
    model: Model, torch_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(model.tokenize(answer)) for answer in (*BASE, *HELPFUL))
    monkeypatch.setattr(steered, "_ANSWERS", (2 * (longest + 1),))
    with SteeredPrompts(model, PROMPTS, BASE, HELPFUL, n_threads=1) as prompts:
        divergence = prompts.divergence(EDITS)
    expected = expected_divergence(torch_model, model, EDITS, PROMPTS, BASE, HELPFUL)
    assert figures(divergence) == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("_full_precision")
def test_long_answers_are_measured_at_their_beginning(model: Model, torch_model: TinyModel) -> None:
    long = [" make a plan and mind the oven" * 9] * len(PROMPTS)
    assert len(model.tokenize(long[0])) > 2 * ANSWER_TOKENS
    with SteeredPrompts(model, PROMPTS, long, long, n_threads=1) as prompts:
        divergence = prompts.divergence(EDITS)
    expected = expected_divergence(torch_model, model, EDITS, PROMPTS, long, long)
    assert figures(divergence) == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("_full_precision")
def test_one_query_alone(model: Model, torch_model: TinyModel) -> None:
    with SteeredPrompts(model, PROMPTS[:1], BASE[:1], HELPFUL[:1], n_threads=1) as prompts:
        (found,) = prompts.first_token_logprobs([Steering(EDITS)])
        divergence = prompts.divergence(EDITS)
    np.testing.assert_allclose(found, expected_first(torch_model, model, EDITS)[:1], atol=PARITY)
    expected = expected_divergence(torch_model, model, EDITS, PROMPTS[:1], BASE[:1], HELPFUL[:1])
    assert figures(divergence) == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("_full_precision")
def test_as_many_queries_as_a_selection_has(model: Model, torch_model: TinyModel) -> None:
    many = [f"{FEW_SHOT}Question: what is {number}?\nAnswer:" for number in range(64)]
    base, helpful = [" make a plan"] * len(many), [" and work slowly"] * len(many)
    with SteeredPrompts(model, many, base, helpful, n_threads=1) as prompts:
        (found,) = prompts.first_token_logprobs([Steering(EDITS)])
        divergence = prompts.divergence(EDITS)
    tokens = model.tokenize(many[-1])
    expected = expected_logprobs(torch_model, tokens, len(tokens), EDITS)[0]
    np.testing.assert_allclose(found[-1], expected, atol=PARITY)
    measured = slice(DIVERGENCE_QUERIES)
    assert figures(divergence) == pytest.approx(
        expected_divergence(torch_model, model, EDITS, many[measured], base[measured], helpful[measured]),
        rel=1e-3,
    )


def test_more_queries_than_sequences_are_refused(model: Model) -> None:
    texts = [f"Question: what is {number}?" for number in range(129)]
    with pytest.raises(QueryError, match="129 queries are too many to score at once; give 128 at most"):
        SteeredPrompts(model, texts, [""] * 129, [""] * 129, n_threads=1)


def test_prompt_of_one_token_is_refused_by_name(model: Model) -> None:
    assert len(model.tokenize("x")) == 1
    with pytest.raises(QueryError, match="'x' is too short"):
        SteeredPrompts(model, ["x"], [""], [""], n_threads=1)


def test_log_softmax_is_that_of_float64_even_for_large_logits() -> None:
    logits = np.random.default_rng(0).normal(size=100).astype(np.float32) * 50 + 1000
    exact = logits.astype(np.float64) - 1000
    expected = exact - np.log(np.exp(exact).sum())
    np.testing.assert_allclose(log_softmax(logits), expected, atol=1e-4)
