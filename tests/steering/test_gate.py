"""A gate in `steer()`: closed, the answer is that of a model that was never steered, bit for bit; open, that
of PyTorch with forward hooks, as without a gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama, LlamaRAMCache

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.gate import Gate
from alignez_gguf.errors import SteeringError
from alignez_gguf.steering.steer import steer
from tests.models import TinyModel, tiny_model
from tests.runtime.gpu import same_bits
from tests.runtime.oracle import hooked_logits
from tests.steering.asking import MORE, N_ANSWER, PARITY, PROMPT, answer, cached, load, strengths
from tests.steering.test_steer import edits_of

SCOPES = ("generation", "all", "first:2")
RANDOM = np.random.default_rng(2)
TOKENS = RANDOM.permutation(300)[:40].astype(np.int32)
WEIGHTS = RANDOM.normal(size=40).astype(np.float32)


@pytest.fixture(scope="module", params=["llama", "lfm2"], ids=["keys and values", "a state too"])
def model(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


def score(model: TinyModel, prompt: Sequence[int]) -> float:
    """What the gate reads, by PyTorch."""
    logits = hooked_logits(model, list(prompt), {}, [0.0] * len(prompt))[-1]
    return Gate(TOKENS, WEIGHTS, 0.0).score(logits)


@pytest.fixture
def prompts(model: TinyModel) -> tuple[list[int], list[int]]:
    """One for which the gate stays closed, and one for which it opens."""
    first, second = sorted((PROMPT, MORE + PROMPT), key=lambda prompt: score(model, prompt))
    return first, second


def gated(model: TinyModel, threshold: float, seed: int = 0) -> ControlFile:
    info = ModelInfo.from_gguf(model.gguf)
    return ControlFile(info, edits_of(seed=seed), gate=Gate(TOKENS, WEIGHTS, threshold))


def between(model: TinyModel, prompts: tuple[list[int], list[int]]) -> float:
    return sum(score(model, prompt) for prompt in prompts) / 2


@pytest.fixture
def control(model: TinyModel, prompts: tuple[list[int], list[int]]) -> ControlFile:
    return gated(model, between(model, prompts))


@pytest.mark.parametrize("scope", SCOPES)
def test_each_request_is_steered_or_left_alone_whatever_came_before(
    model: TinyModel,
    llm: Llama,
    never_steered: Llama,
    control: ControlFile,
    prompts: tuple[list[int], list[int]],
    scope: str,
) -> None:
    closed, opened = prompts
    with steer(llm, control, scope=scope) as steering:
        for strength in (1.0, 0.5):
            steering.strength = strength
            for prompt in (closed, opened, opened, closed, closed):
                answered = answer(llm, prompt)
                plain = answer(never_steered, prompt)  # the same requests before it: they cut its prompt
                tokens, logits = cached(llm)
                if prompt is closed:
                    assert answered == plain
                    assert same_bits(logits, cached(never_steered)[1])
                else:
                    of_tokens = strengths(scope, strength, len(prompt), len(tokens))
                    expected = hooked_logits(model, tokens, control.edits, of_tokens)
                    assert np.abs(logits - expected).max() < PARITY
    for prompt in prompts:
        llm.reset()
        never_steered.reset()
        assert answer(llm, prompt) == answer(never_steered, prompt)


def test_open_gate_is_no_gate_and_strength_zero_is_off(
    llm: Llama, never_steered: Llama, control: ControlFile, prompts: tuple[list[int], list[int]]
) -> None:
    _, opened = prompts
    with steer(llm, control, strength=0.0) as steering:
        plain = answer(llm, opened)
        assert plain == answer(never_steered, opened)
        assert same_bits(cached(llm)[1], cached(never_steered)[1])
        steering.strength = 1.0
        steered = answer(llm, opened)
    with steer(llm, dataclasses.replace(control, gate=None)):
        assert answer(llm, opened) == steered != plain


def test_closed_gate_computes_nothing_twice(
    llm: Llama,
    control: ControlFile,
    prompts: tuple[list[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed, opened = prompts
    sizes: list[int] = []
    decode = llm._ctx.decode

    def counted(batch: Any) -> None:
        sizes.append(batch.batch.n_tokens)
        decode(batch)

    monkeypatch.setattr(llm._ctx, "decode", counted)
    with steer(llm, control):
        answer(llm, closed, 1)
        assert sizes == [len(closed)]
        sizes.clear()
        llm.reset()
        answer(llm, opened, 1)
        again = len(opened) if llm._is_recurrent or llm._is_hybrid else 1
        assert sizes == [len(opened), again]


def test_controls_decide_each_by_its_own_gate(
    model: TinyModel, llm: Llama, control: ControlFile, prompts: tuple[list[int], list[int]]
) -> None:
    closed, opened = prompts
    other = gated(model, min(score(model, prompt) for prompt in prompts) - 1, seed=3)
    with steer(llm, other):
        alone = answer(llm, closed)
    with (
        steer(llm, dataclasses.replace(control, gate=None)),
        steer(llm, dataclasses.replace(other, gate=None)),
    ):
        both = answer(llm, opened)
    with steer(llm, control), steer(llm, other):
        assert answer(llm, closed) == alone
        assert answer(llm, opened) == both
        assert answer(llm, closed) == alone


def test_cached_states_are_not_taken_for_those_of_the_other_kind(
    llm: Llama, never_steered: Llama, control: ControlFile, prompts: tuple[list[int], list[int]]
) -> None:
    closed, opened = prompts
    with steer(llm, dataclasses.replace(control, gate=None)):
        steered = answer(llm, opened)
    plain = answer(never_steered, closed)
    llm.set_cache(LlamaRAMCache())
    with steer(llm, control):
        states = []
        for prompt, expected in ((closed, plain), (opened, steered)):
            assert answer(llm, prompt) == expected
            states.append(llm.save_state())
        for state in states:
            for prompt, expected in ((closed, plain), (opened, steered)):
                llm.load_state(state)
                assert answer(llm, prompt) == expected


def test_adapters_of_stock_llama_cpp_obey_the_gate(
    model: TinyModel, never_steered: Llama, control: ControlFile, prompts: tuple[list[int], list[int]]
) -> None:
    closed, opened = prompts
    removing = {
        layer: dataclasses.replace(edit, add=None) for layer, edit in control.edits.items() if edit.rank
    }
    control = dataclasses.replace(control, edits=removing)
    llm = load(model.gguf)
    with steer(llm, control, runtime="stock"):
        for prompt in (opened, closed, opened):
            answered = answer(llm, prompt)
            tokens, logits = cached(llm)
            if prompt is closed:
                assert answered == answer(never_steered, prompt)
                assert same_bits(logits, cached(never_steered)[1])
            else:
                of_tokens = strengths("generation", 1.0, len(prompt), len(tokens))
                expected = hooked_logits(model, tokens, removing, of_tokens)
                assert np.abs(logits - expected).max() < 1e-3
    llm.close()


def test_what_is_no_whole_request_is_refused(llm: Llama, control: ControlFile) -> None:
    with steer(llm, control):
        with pytest.raises(SteeringError, match="eval is no request"):
            llm.eval(PROMPT)
        answer(llm, PROMPT)
        with pytest.raises(SteeringError, match="reset=True"):
            next(iter(llm.generate(MORE, reset=False)))


def test_prompt_of_an_empty_cache_is_computed_once_without_reset_too(
    llm: Llama, never_steered: Llama, control: ControlFile, prompts: tuple[list[int], list[int]]
) -> None:
    closed, opened = prompts
    with steer(llm, dataclasses.replace(control, gate=None)):
        steered = answer(llm, opened)
    for prompt, expected in ((closed, answer(never_steered, closed)), (opened, steered)):
        llm.reset()
        with steer(llm, control):
            assert list(islice(llm.generate(prompt, temp=0.0, reset=False), N_ANSWER)) == expected
            assert llm.n_tokens == len(prompt) + N_ANSWER - 1


def test_off_asks_nothing_and_hinders_nothing(
    llm: Llama, never_steered: Llama, control: ControlFile, prompts: tuple[list[int], list[int]]
) -> None:
    _, opened = prompts
    with steer(llm, control, strength=0.0) as steering:
        for llama in (llm, never_steered):
            llama.reset()
            llama.eval(opened)
        assert same_bits(cached(llm)[1], cached(never_steered)[1])
        for llama in (llm, never_steered):
            assert len(list(islice(llama.generate(MORE, temp=0.0, reset=False), 2))) == 2
        assert same_bits(cached(llm)[1], cached(never_steered)[1])
        steering.strength = 1.0
        with pytest.raises(SteeringError, match="eval is no request"):
            llm.eval(MORE)


def test_strength_that_rises_in_an_answer_that_was_off_steers_from_the_next_request_on(
    llm: Llama, never_steered: Llama, control: ControlFile, prompts: tuple[list[int], list[int]]
) -> None:
    _, opened = prompts
    with steer(llm, control, strength=0.0) as steering:
        tokens = llm.generate(opened, temp=0.0)
        first = [next(tokens), next(tokens)]
        steering.strength = 1.0
        assert first + list(islice(tokens, N_ANSWER - 2)) == answer(never_steered, opened)
        assert answer(llm, opened) != answer(never_steered, opened)


def test_gate_of_another_vocabulary_is_an_error(model: TinyModel, llm: Llama, control: ControlFile) -> None:
    foreign = dataclasses.replace(control, gate=Gate(TOKENS + np.int32(100_000), WEIGHTS, 0.0))
    before = set(vars(llm))
    with pytest.raises(SteeringError, match="use a control file made for this model"):
        steer(llm, foreign)
    assert set(vars(llm)) == before
