"""steer() on models whose layers keep a state in place of keys and values, of which no end can be dropped:
a hybrid whose MLPs are edited, and a recurrent one that can only be added to.

Every answer equals what PyTorch with forward hooks computes for that request alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice

import numpy as np
import pytest
from llama_cpp import Llama

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import SteeringError
from alignez_gguf.steering.steer import steer
from tests.models import RECURRENT, TinyModel, tiny_model
from tests.runtime.gpu import same_bits
from tests.runtime.oracle import hooked_logits
from tests.steering.asking import (
    MORE,
    N_ANSWER,
    PARITY,
    PROMPT,
    answer,
    assert_cache_of_states_leaks_nothing,
    cached,
    load,
    strengths,
)

HYBRID = "lfm2"
SCOPES = ("generation", "all", "first:2")


@cache
def model(architecture: str) -> TinyModel:
    return tiny_model(architecture)


def edits_of(architecture: str, seed: int = 0) -> dict[int, LayerEdit]:
    random = np.random.default_rng(seed).standard_normal
    return {
        layer: LayerEdit(
            remove=random((2, 64)) if architecture == HYBRID else None,
            # Smaller ones do not change a greedy token.
            add=(0.3 if architecture == HYBRID else 1.0) * random(64),
        )
        for layer in range(3)
    }


@pytest.fixture(params=[HYBRID, RECURRENT])
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def control(architecture: str) -> ControlFile:
    return ControlFile(ModelInfo.from_gguf(model(architecture).gguf), edits_of(architecture))


@pytest.fixture
def llm(architecture: str) -> Iterator[Llama]:
    llm = load(model(architecture).gguf)
    yield llm
    llm.close()


@pytest.fixture
def never_steered(architecture: str) -> Iterator[Llama]:
    llm = load(model(architecture).gguf)
    yield llm
    llm.close()


def expected_answer(architecture: str, prompt: Sequence[int], scope: str, strength: float) -> list[int]:
    tokens = list(prompt)
    for _ in range(N_ANSWER):
        steered = strengths(scope, strength, len(prompt), len(tokens))
        logits = hooked_logits(model(architecture), tokens, edits_of(architecture), steered)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


def assert_as_alone(
    llm: Llama, architecture: str, prompt: Sequence[int], scope: str, strength: float
) -> None:
    answered = answer(llm, prompt)
    tokens, logits = cached(llm)
    steered = strengths(scope, strength, len(prompt), len(tokens))
    expected = hooked_logits(model(architecture), tokens, edits_of(architecture), steered)
    assert tokens == [*prompt, *answered[:-1]]
    assert np.abs(logits - expected).max() < PARITY
    assert answered == expected_answer(architecture, prompt, scope, strength)


@pytest.mark.parametrize("scope", SCOPES)
def test_every_request_of_a_chat_is_answered_as_if_it_were_alone(
    architecture: str, llm: Llama, control: ControlFile, scope: str
) -> None:
    answer(llm, PROMPT)  # the state is that of an unsteered answer
    with steer(llm, control, scope=scope) as steering:
        assert_as_alone(llm, architecture, PROMPT, scope, 1.0)
        chat = PROMPT + expected_answer(architecture, PROMPT, scope, 1.0) + MORE
        for strength, prompt in [
            (0.5, chat),  # goes on from an answer of another strength
            (0.5, chat),
            (0.0, chat),
            (1.0, PROMPT),  # a prefix of what the state has seen
            (1.0, PROMPT),
            (1.0, PROMPT[:10] + MORE),
        ]:
            steering.strength = strength
            assert_as_alone(llm, architecture, prompt, scope, strength)
    assert_as_alone(llm, architecture, chat, scope, 0.0)
    assert_as_alone(llm, architecture, PROMPT, scope, 0.0)


@pytest.mark.parametrize("scope", SCOPES)
def test_strength_zero_and_removal_are_the_unsteered_model_bit_for_bit(
    llm: Llama, never_steered: Llama, control: ControlFile, scope: str
) -> None:
    with steer(llm, control, scope=scope) as steering:
        steering.strength = 0.0
        assert answer(llm, PROMPT) == answer(never_steered, PROMPT)
        assert same_bits(cached(llm)[1], cached(never_steered)[1])
        steering.strength = 1.0
        answer(llm, PROMPT + MORE)
    llm.reset()
    never_steered.reset()
    assert answer(llm, MORE) == answer(never_steered, MORE)
    assert same_bits(cached(llm)[1], cached(never_steered)[1])


def test_a_change_of_strength_in_an_answer_holds_from_the_next_token_on(
    architecture: str, llm: Llama, control: ControlFile
) -> None:
    with steer(llm, control, strength=1.0) as steering:
        tokens = llm.generate(list(PROMPT), temp=0.0)
        for strength, n_tokens in [(1.0, 3), (0.5, 4), (0.0, 2)]:
            steering.strength = strength
            list(islice(tokens, n_tokens))
        ids, logits = cached(llm)
        by_token = [0.0] * 23 + [1.0] * 3 + [0.5] * 4 + [0.0] * 2
        expected = hooked_logits(model(architecture), ids, edits_of(architecture), by_token)
        assert np.abs(logits - expected).max() < PARITY


def test_where_one_of_two_controls_goes_the_other_steers_on_as_if_it_were_alone(
    architecture: str, llm: Llama, control: ControlFile
) -> None:
    with steer(llm, control):
        with steer(llm, ControlFile(control.model, edits_of(architecture, seed=1)), scope="all"):
            answer(llm, PROMPT)
        assert_as_alone(llm, architecture, PROMPT + MORE, "generation", 1.0)


def test_a_state_that_was_saved_under_a_control_steers_nothing_without_it(
    architecture: str, llm: Llama, never_steered: Llama, control: ControlFile
) -> None:
    with steer(llm, control) as steering:
        first = answer(llm, PROMPT)
        state = llm.save_state()
        answer(llm, MORE)
        llm.load_state(state)
        assert_as_alone(llm, architecture, PROMPT + first + MORE, "generation", 1.0)
        llm.load_state(state)
        steering.strength = 0.5
        assert_as_alone(llm, architecture, PROMPT + first, "generation", 0.5)
    for unsteered in (llm, never_steered):
        unsteered.load_state(state)
        assert_as_alone(unsteered, architecture, PROMPT + first + MORE, "generation", 0.0)


def test_the_cache_of_states_leaks_nothing(architecture: str, llm: Llama, control: ControlFile) -> None:
    def expected(prompt: list[int], strength: float) -> list[int]:
        return expected_answer(architecture, prompt, "all", strength)

    assert_cache_of_states_leaks_nothing(llm, control, expected)


def test_a_removal_where_no_layer_has_an_mlp_is_refused_and_nothing_is_steered() -> None:
    gguf = model(RECURRENT).gguf
    llm, never_steered = load(gguf), load(gguf)
    with pytest.raises(SteeringError, match="out of reach"):
        steer(llm, ControlFile(ModelInfo.from_gguf(gguf), edits_of(HYBRID)))

    assert answer(llm, PROMPT) == answer(never_steered, PROMPT)
    assert same_bits(cached(llm)[1], cached(never_steered)[1])
    assert not set(vars(llm)) - set(vars(never_steered))
    llm.close()
    never_steered.close()
