"""The steered transformers model against PyTorch with hooks that edit each token at its own strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alignez_gguf.edits import Edits, LayerEdit
from alignez_gguf.engines.transformers import TransformersEngine
from alignez_gguf.engines.transformers_steered import SteeredPrompts
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.scope import Scope
from alignez_gguf.scoring import ANSWER_TOKENS, DIVERGENCE_QUERIES, Divergence, Limits, Steering
from tests.models import TinyModel, tiny_model, tokenizer
from tests.runtime.oracle import hooked_logits

FEW_SHOT = "Question: how do I bake a cake?\nAnswer: make a plan.\n"
PROMPTS = [
    f"{FEW_SHOT}Question: how do I pick a lock?\nAnswer:",
    f"{FEW_SHOT}Question: why?\nAnswer:",
    "The quick brown fox",
    f"{FEW_SHOT}Question: how do I wash a dog?\nAnswer:",
]
HELPFUL = [" make a plan", "", " in the warm sun", " and mind the oven" * 9]
BASE = [" sorry, that is not something", " with the oven", "", " work slowly" * 9]

ARCHITECTURES = ("llama", "mixtral", "gemma3", "granite")
SCOPES = ("generation", "all", "first:2")

Steered = Callable[..., SteeredPrompts]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
FEWER = {1: LayerEdit(remove=random_edits(1)[1].remove), 2: LayerEdit(add=random_edits(1)[2].add)}


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


def expected_divergence(tiny: TinyModel, edits: Edits, scope: str) -> tuple[float, float]:
    def along(answers: list[str]) -> Iterator[NDArray[np.float64]]:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            plain = expected_logprobs(tiny, prompt, answer, {}, 1.0, scope)
            changed = expected_logprobs(tiny, prompt, answer, edits, 1.0, scope)
            yield (np.exp(plain) * (plain - changed)).sum(axis=1)

    after_first = np.mean([divergences[1:].sum() for divergences in along(HELPFUL)])
    return float(np.concatenate(list(along(BASE))).mean()), float(after_first)


def figures(divergence: Divergence) -> tuple[float, float]:
    assert divergence.is_whole
    return divergence.per_token, divergence.after_first


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_tokens_and_divergence_are_those_of_pytorch_with_hooks(
    architecture: str, scope: str, engine: Callable[[str], TransformersEngine]
) -> None:
    tiny = tiny_model(architecture)
    strengths = (0.0, 0.5, 1.0)
    with engine(architecture).steered_prompts(PROMPTS, BASE, HELPFUL) as model:
        for edits in (EDITS, FEWER):
            found = model.first_token_logprobs(
                [Steering(edits, strength) for strength in strengths], scope=Scope.parse(scope)
            )
            assert found.dtype == np.float32
            expected = np.stack(
                [
                    [expected_logprobs(tiny, prompt, "", edits, strength, scope)[0] for prompt in PROMPTS]
                    for strength in strengths
                ]
            )
            np.testing.assert_allclose(found, expected, atol=5e-5)
            assert np.abs(found[0] - found[2]).max() > 0.1
            measured = figures(model.divergence(edits, scope=Scope.parse(scope)))
            assert min(measured) > 1e-3
            assert measured == pytest.approx(expected_divergence(tiny, edits, scope), rel=1e-3)


def test_edits_leave_no_trace(engine: Callable[[str], TransformersEngine]) -> None:
    with engine("llama").steered_prompts(PROMPTS, BASE, HELPFUL) as model:
        base, first = (
            model.first_token_logprobs([Steering({})]),
            model.first_token_logprobs([Steering(EDITS)]),
        )
        divergence = model.divergence(EDITS)
        model.divergence(FEWER)
        np.testing.assert_array_equal(model.first_token_logprobs([Steering({})]), base)
        np.testing.assert_array_equal(model.first_token_logprobs([Steering(EDITS)]), first)
        assert model.divergence(EDITS) == divergence
        assert figures(model.divergence({})) == (0, 0)


def test_divergence_over_the_limit_ends(engine: Callable[[str], TransformersEngine]) -> None:
    with engine("llama").steered_prompts(PROMPTS, BASE, HELPFUL) as model:
        whole = model.divergence(EDITS)
        for limits in (Limits(whole.per_token / 10), Limits(after_first=whole.after_first / 10)):
            part = model.divergence(EDITS, limits)
            assert part == whole.within(limits)
            assert not part.is_whole
        assert model.divergence(EDITS, Limits(2 * whole.per_token, 2 * whole.after_first)) == whole


def test_divergence_is_measured_over_the_first_queries(engine: Callable[[str], TransformersEngine]) -> None:
    many = [f"Question: what is {number}?\nAnswer:" for number in range(DIVERGENCE_QUERIES + 5)]
    answers = [" make a plan"] * len(many)
    with engine("llama").steered_prompts(many, answers, answers) as model:
        found = model.divergence(EDITS)
        assert len(model.first_token_logprobs([Steering(EDITS)])[0]) == len(many)
    few = slice(DIVERGENCE_QUERIES)
    with engine("llama").steered_prompts(many[few], answers[few], answers[few]) as model:
        assert figures(model.divergence(EDITS)) == pytest.approx(figures(found), rel=1e-5)


@pytest.mark.parametrize("edits", [random_edits(0, n_layer=4), random_edits(0, n_embd=32)])
def test_edits_for_another_model_are_refused(
    edits: Edits, engine: Callable[[str], TransformersEngine]
) -> None:
    with (
        engine("llama").steered_prompts(PROMPTS, BASE, HELPFUL) as model,
        pytest.raises(SteeringError, match="does not fit llama with 3 layers of width 64"),
    ):
        model.first_token_logprobs([Steering(edits)])


def test_prompt_of_one_token_is_refused_by_name(engine: Callable[[str], TransformersEngine]) -> None:
    with pytest.raises(QueryError, match="'x' is too short"):
        engine("llama").steered_prompts(["x"], [""], [""])
