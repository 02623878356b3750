"""LlamaEditScorer against PyTorch with forward hooks that edit each token at its own strength."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.llama import edit_scoring
from alignez_gguf.engines.llama.edit_scoring import LlamaEditScorer
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.selection.logprobs import log_softmax
from alignez_gguf.selection.scoring import ANSWER_TOKENS
from tests.models import TinyModel, tiny_model
from tests.runtime.oracle import hooked_logits

PARITY = 5e-5
"""Largest difference to PyTorch per token in log-probability, with keys and values in F32."""
PARITY_F16 = 2e-2
"""With keys and values in F16, as users have them: 11 bits of each are left."""

FEW_SHOT = "Question: how do I bake a cake?\nAnswer: make a plan.\n"
LOCK = f"{FEW_SHOT}Question: how do I pick a lock?\nAnswer:"
PASSAGES = [
    Passage(LOCK, " make a plan"),
    Passage(f"{FEW_SHOT}Question: how do I wash a dog?\nAnswer:", " work slowly and mind the oven" * 9),
    Passage(f"{FEW_SHOT}Question: why?\nAnswer:", "."),
    Passage("The quick brown fox", " in the warm sun"),
    Passage(LOCK, " sorry, that is not something"),
    Passage(LOCK, " make a plan"),
]
"""Several answers to one prompt, one that is cut at `ANSWER_TOKENS`, and one of a single token."""
ALL = range(len(PASSAGES))
SCOPES = ("generation", "all", "first:1", "first:3")


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
    monkeypatch.setattr(edit_scoring, "Context", partial(Context, f32_cache=True))


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


def expected(torch_model: TinyModel, model: Model, edits: Edits, scope: str = "generation") -> list[float]:
    """log P(answer | prompt) of each passage."""

    def of(passage: Passage) -> float:
        n_prompt = len(model.tokenize(passage.prompt))
        tokens = model.tokenize(passage.prompt + passage.response)[: n_prompt + ANSWER_TOKENS]
        rows = expected_logprobs(torch_model, tokens[:-1], n_prompt, edits, scope=scope)
        return float(sum(row[token] for row, token in zip(rows, tokens[n_prompt:], strict=True)))

    return list(map(of, PASSAGES))


@pytest.fixture
def passages(model: Model, _full_precision: None) -> Iterator[LlamaEditScorer]:
    with LlamaEditScorer(model, PASSAGES, n_threads=1) as passages:
        yield passages


def test_the_passages_are_what_they_should_be(model: Model) -> None:
    lengths = [len(model.tokenize(one.text)) - len(model.tokenize(one.prompt)) for one in PASSAGES]
    assert max(lengths) > 2 * ANSWER_TOKENS
    assert min(lengths) == 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("edits", [EDITS, FEWER, {}], ids=["all layers", "one layer", "no edit"])
def test_likelihoods_are_those_of_pytorch_edited_in_the_same_time_steps(
    passages: LlamaEditScorer, torch_model: TinyModel, model: Model, edits: Edits, scope: str
) -> None:
    found = passages.log_likelihoods(edits, ALL, scope=Scope.parse(scope))
    wanted = expected(torch_model, model, edits, scope)
    np.testing.assert_allclose(found, wanted, atol=PARITY * ANSWER_TOKENS)
    if edits:
        assert np.abs(found - expected(torch_model, model, {})).max() > 5e-2


def test_likelihoods_with_the_cache_that_users_have(torch_model: TinyModel, model: Model) -> None:
    with LlamaEditScorer(model, PASSAGES, n_threads=1) as passages:
        found = passages.log_likelihoods(EDITS, ALL)
    np.testing.assert_allclose(found, expected(torch_model, model, EDITS), atol=PARITY_F16 * ANSWER_TOKENS)


@pytest.mark.parametrize("scope", SCOPES)
def test_some_passages_are_measured_as_among_all(passages: LlamaEditScorer, scope: str) -> None:
    chosen = Scope.parse(scope)
    found = passages.log_likelihoods(EDITS, ALL, scope=chosen)
    for some in ([3], [4, 1], [5, 0, 2]):
        np.testing.assert_allclose(
            passages.log_likelihoods(EDITS, some, scope=chosen), found[some], atol=PARITY * ANSWER_TOKENS
        )


def test_likelihoods_do_not_depend_on_what_was_measured_before(
    passages: LlamaEditScorer, model: Model
) -> None:
    base, steered_ones = passages.log_likelihoods({}, ALL), passages.log_likelihoods(EDITS, ALL)
    for scope in map(Scope.parse, SCOPES):
        passages.log_likelihoods(FEWER, [1, 0], scope=scope)
    np.testing.assert_array_equal(passages.log_likelihoods({}, ALL), base)
    np.testing.assert_array_equal(passages.log_likelihoods(EDITS, ALL), steered_ones)
    with LlamaEditScorer(model, PASSAGES, n_threads=1) as fresh:
        np.testing.assert_array_equal(fresh.log_likelihoods(EDITS, ALL), steered_ones)


@pytest.mark.usefixtures("_full_precision")
def test_passages_that_do_not_fit_into_one_batch(
    model: Model, torch_model: TinyModel, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    monkeypatch.setattr(edit_scoring, "_BATCH", 8)
    with LlamaEditScorer(model, PASSAGES, n_threads=1) as passages:
        batches.clear()
        found = passages.log_likelihoods(EDITS, ALL)
    assert len(batches) > 2
    np.testing.assert_allclose(found, expected(torch_model, model, EDITS), atol=PARITY * ANSWER_TOKENS)


def test_edits_for_another_model_are_refused_and_leave_no_trace(passages: LlamaEditScorer) -> None:
    base = passages.log_likelihoods({}, ALL)
    with pytest.raises(SteeringError):
        passages.log_likelihoods(random_edits(0, n_embd=32), ALL)
    np.testing.assert_array_equal(passages.log_likelihoods({}, ALL), base)


def test_more_prompts_than_sequences_are_refused(model: Model) -> None:
    many = [Passage(f"Question: what is {number}?", " x") for number in range(256)]
    with pytest.raises(QueryError, match="256 prompts are too many to score at once; give 255 at most"):
        LlamaEditScorer(model, many, n_threads=1)


def test_prompt_of_one_token_is_refused_by_name(model: Model) -> None:
    assert len(model.tokenize("x")) == 1
    with pytest.raises(QueryError, match="'x' is too short to steer"):
        LlamaEditScorer(model, [Passage("x", " y")], n_threads=1)


def test_empty_answer_is_refused_by_name(model: Model) -> None:
    with pytest.raises(QueryError, match="the answer to 'why not' is empty"):
        LlamaEditScorer(model, [Passage("why not", "")], n_threads=1)


def test_log_softmax_is_that_of_float64_even_for_large_logits() -> None:
    logits = np.random.default_rng(0).normal(size=100).astype(np.float32) * 50 + 1000
    exact = logits.astype(np.float64) - 1000
    expected = exact - np.log(np.exp(exact).sum())
    np.testing.assert_allclose(log_softmax(logits), expected, atol=1e-4)
