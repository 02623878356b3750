"""The steered transformers model against PyTorch with hooks that edit each token at its own strength."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.transformers.engine import TransformersEngine
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.selection.scoring import ANSWER_TOKENS
from tests.models import TinyModel, tiny_model, tokenizer
from tests.runtime.oracle import hooked_logits

FEW_SHOT = "Question: how do I bake a cake?\nAnswer: make a plan.\n"
PROMPTS = [
    f"{FEW_SHOT}Question: how do I pick a lock?\nAnswer:",
    f"{FEW_SHOT}Question: why?\nAnswer:",
    "The quick brown fox",
    f"{FEW_SHOT}Question: how do I wash a dog?\nAnswer:",
]
ANSWERS = [" make a plan", ".", " in the warm sun", " and mind the oven" * 9]
PASSAGES = [Passage(*both) for both in zip(PROMPTS, ANSWERS, strict=True)]
ALL = range(len(PASSAGES))

ARCHITECTURES = ("llama", "mixtral", "gemma3", "granite")
SCOPES = ("generation", "all", "first:2")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TransformersEngine]:
    @cache
    def load(architecture: str) -> TransformersEngine:
        directory: Path = tmp_path_factory.mktemp(architecture)
        tiny_model(architecture).hf.save_pretrained(directory)
        tokenizer().save_pretrained(directory)
        return TransformersEngine(directory, n_ctx=256, n_parallel=3)

    return load


def random_edits(seed: int, n_layer: int = 3, n_embd: int = 64) -> Edits:
    normal = np.random.default_rng(seed).standard_normal
    return {
        layer: LayerEdit(remove=normal((2, n_embd)), add=0.2 * normal(n_embd)) for layer in range(n_layer)
    }


EDITS = random_edits(0)
FEWER = {
    1: LayerEdit(remove=random_edits(1)[1].remove, gain=[0.5, 2.0]),
    2: LayerEdit(add=random_edits(1)[2].add, bias=random_edits(2)[2].add),
}


def expected_logprobs(
    tiny: TinyModel, prompt: str, answer: str, edits: Edits, strength: float, scope: str
) -> NDArray[np.float64]:
    """[1 + answer, n_vocab], from the last prompt token on."""
    n_prompt = len(tokenizer().encode(prompt))
    tokens = tokenizer().encode(prompt + answer)[: n_prompt + ANSWER_TOKENS]
    end = n_prompt + 1 if scope == "first:2" else len(tokens)
    first = 0 if scope == "all" else n_prompt - 1
    strengths = [strength if first <= position < end else 0.0 for position in range(len(tokens))]
    logits = hooked_logits(tiny, tokens, edits, strengths)[n_prompt - 1 :].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def expected(tiny: TinyModel, edits: Edits, scope: str) -> list[float]:
    """log P(answer | prompt) of each passage."""

    def of(passage: Passage) -> float:
        n_prompt = len(tokenizer().encode(passage.prompt))
        tokens = tokenizer().encode(passage.text)[n_prompt:][:ANSWER_TOKENS]
        rows = expected_logprobs(tiny, passage.prompt, passage.response, edits, 1.0, scope)
        return float(sum(row[token] for row, token in zip(rows, tokens, strict=False)))

    return list(map(of, PASSAGES))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_likelihoods_are_those_of_pytorch_with_hooks(
    architecture: str, scope: str, engine: Callable[[str], TransformersEngine]
) -> None:
    tiny = tiny_model(architecture)
    with engine(architecture).steered(PASSAGES) as model:
        for edits in (EDITS, FEWER, {}):
            found = model.log_likelihoods(edits, ALL, scope=Scope.parse(scope))
            np.testing.assert_allclose(found, expected(tiny, edits, scope), atol=5e-5 * ANSWER_TOKENS)
            if edits:
                assert np.abs(found - expected(tiny, {}, scope)).max() > 0.1


def test_some_passages_are_measured_as_among_all(engine: Callable[[str], TransformersEngine]) -> None:
    with engine("llama").steered(PASSAGES) as model:
        found = model.log_likelihoods(EDITS, ALL)
        for some in ([3], [2, 0]):
            np.testing.assert_allclose(model.log_likelihoods(EDITS, some), found[some], atol=1e-3)


def test_edits_leave_no_trace(engine: Callable[[str], TransformersEngine]) -> None:
    with engine("llama").steered(PASSAGES) as model:
        base, steered = model.log_likelihoods({}, ALL), model.log_likelihoods(EDITS, ALL)
        model.log_likelihoods(FEWER, ALL, scope=Scope("all"))
        np.testing.assert_array_equal(model.log_likelihoods({}, ALL), base)
        np.testing.assert_array_equal(model.log_likelihoods(EDITS, ALL), steered)


@pytest.mark.parametrize("edits", [random_edits(0, n_layer=4), random_edits(0, n_embd=32)])
def test_edits_for_another_model_are_refused(
    edits: Edits, engine: Callable[[str], TransformersEngine]
) -> None:
    with (
        engine("llama").steered(PASSAGES) as model,
        pytest.raises(SteeringError, match="does not fit llama with 3 layers of width 64"),
    ):
        model.log_likelihoods(edits, ALL)


def test_prompt_of_one_token_is_refused_by_name(engine: Callable[[str], TransformersEngine]) -> None:
    with pytest.raises(QueryError, match="'x' is too short to steer"):
        engine("llama").steered([Passage("x", " y")])


def test_empty_answer_is_refused_by_name(engine: Callable[[str], TransformersEngine]) -> None:
    with pytest.raises(QueryError, match="the answer to 'why not' is empty"):
        engine("llama").steered([Passage("why not", "")])
