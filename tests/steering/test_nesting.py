"""Several controls on one `llama_cpp.Llama`: every answer equals what PyTorch computes for that request
alone, the hooks of one control after those of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations

import numpy as np
import pytest
from llama_cpp import Llama
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import ControlFileError, SteeringError
from alignez_gguf.steering.steer import Steering, steer
from tests.models import OUT_OF_REACH, TinyModel, tiny_model
from tests.runtime.oracle import nested_logits
from tests.steering.asking import MORE, N_ANSWER, PARITY, PROMPT, answer, cached, load, strengths


def edits_of(seed: int) -> dict[int, LayerEdit]:
    random = np.random.default_rng(seed).standard_normal
    return {layer: LayerEdit(remove=random((2, 64)), add=0.2 * random(64)) for layer in range(3)}


@dataclass(frozen=True)
class Asked:
    """A control as a test asks for it."""

    seed: int
    strength: float
    scope: str

    def on(self, llm: Llama) -> Steering:
        info = ModelInfo.from_llama(llm)
        return steer(llm, ControlFile(info, edits_of(self.seed)), strength=self.strength, scope=self.scope)


A = Asked(0, 1.0, "all")
B = Asked(1, 0.7, "generation")
C = Asked(2, 0.5, "first:2")


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_model("llama")


def expected_logits(
    model: TinyModel, tokens: Sequence[int], n_prompt: int, nested: Sequence[Asked]
) -> NDArray[np.float32]:
    """Of all tokens of a request, without a cache."""
    steered = [
        (edits_of(each.seed), strengths(each.scope, each.strength, n_prompt, len(tokens))) for each in nested
    ]
    return nested_logits(model, tokens, steered)


def assert_as_alone(model: TinyModel, llm: Llama, prompt: Sequence[int], *nested: Asked) -> None:
    """Ask, and hold the tokens and the logits of the whole request against PyTorch."""
    answered = answer(llm, prompt)
    tokens, logits = cached(llm)
    expected = expected_logits(model, tokens, len(prompt), nested)
    assert tokens == [*prompt, *answered[:-1]]
    assert np.abs(logits - expected).max() < PARITY
    assert answered == expected[len(prompt) - 1 :].argmax(1).tolist()


def from_scratch(model: TinyModel, *nested: Asked) -> tuple[list[int], NDArray[np.float32]]:
    """The answer, and the logits, of a model that nothing else ever steered."""
    llm = load(model.gguf)
    for each in nested:
        each.on(llm)
    answered = answer(llm, MORE)
    logits = cached(llm)[1]
    llm.close()
    return answered, logits


def assert_exactly(model: TinyModel, llm: Llama, *nested: Asked) -> None:
    """Ask with an empty cache, and find no bit that differs from a model under these controls alone."""
    llm.reset()
    answered, logits = from_scratch(model, *nested)
    assert answer(llm, MORE) == answered
    assert np.array_equal(cached(llm)[1], logits)


def test_the_order_and_every_control_matter(model: TinyModel) -> None:
    all_of_them = [nested for n in range(4) for nested in permutations((A, B, C), n)]
    logits = [expected_logits(model, PROMPT + MORE, len(PROMPT), nested) for nested in all_of_them]
    for index, one in enumerate(logits):
        for other in logits[:index]:
            assert np.abs(one - other).max() > 20 * PARITY, "the tests could not tell one from the other"


@pytest.mark.parametrize("nested", list(permutations((A, B))) + list(permutations((A, B, C))))
def test_controls_act_in_the_order_of_attachment(
    model: TinyModel, llm: Llama, nested: tuple[Asked, ...]
) -> None:
    for each in nested:
        each.on(llm)
    assert_as_alone(model, llm, PROMPT, *nested)


def test_a_file_attached_twice_acts_twice(model: TinyModel, llm: Llama) -> None:
    again = replace(A, strength=0.5, scope="generation")
    with A.on(llm) as first, again.on(llm):
        assert_as_alone(model, llm, PROMPT, A, again)
        first.remove()
        assert_as_alone(model, llm, PROMPT, again)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_what_is_left_is_exactly_what_the_others_give_alone(
    model: TinyModel, llm: Llama, order: tuple[int, ...]
) -> None:
    nested = [A, B, C]
    handles = [each.on(llm) for each in nested]
    left = list(nested)
    for index in order:
        answer(llm, PROMPT)
        handles[index].remove()
        left.remove(nested[index])
        assert_exactly(model, llm, *left)
    assert "_alignez_steering" not in vars(llm)


def test_every_request_is_answered_as_if_it_were_alone(model: TinyModel, llm: Llama) -> None:
    chat = PROMPT + answer(llm, PROMPT) + MORE
    first = B.on(llm)
    assert_as_alone(model, llm, PROMPT, B)
    second = A.on(llm)
    assert_as_alone(model, llm, PROMPT, B, A)
    assert_as_alone(model, llm, chat, B, A)
    first.strength = 0.3
    assert_as_alone(model, llm, chat, replace(B, strength=0.3), A)
    second.strength, second.scope = 0.4, "generation"  # type: ignore[assignment]
    assert_as_alone(model, llm, PROMPT, replace(B, strength=0.3), Asked(A.seed, 0.4, "generation"))
    # the sum of the strengths is the same, and the prompt cached
    first.strength, second.strength = 0.4, 0.3
    assert_as_alone(model, llm, PROMPT, replace(B, strength=0.4), Asked(A.seed, 0.3, "generation"))
    first.remove()
    assert_as_alone(model, llm, chat, Asked(A.seed, 0.3, "generation"))
    third = C.on(llm)
    assert_as_alone(model, llm, chat, Asked(A.seed, 0.3, "generation"), C)
    second.remove()
    assert_as_alone(model, llm, chat, C)
    third.remove()
    assert_as_alone(model, llm, PROMPT)


def test_the_cache_keeps_what_a_removed_control_did_not_steer(llm: Llama) -> None:
    with A.on(llm):
        with B.on(llm):
            answer(llm, PROMPT)
        assert llm.n_tokens == len(PROMPT) - 1
    assert llm.n_tokens == 0


def test_a_change_of_strength_in_an_answer_holds_from_the_next_token_on(model: TinyModel, llm: Llama) -> None:
    with B.on(llm) as first, A.on(llm) as second:
        tokens = llm.generate(list(PROMPT), temp=0.0)
        list(islice(tokens, 3))
        first.strength = 0.2
        second.strength = 0.0
        list(islice(tokens, 3))
    ids = [*llm.input_ids[: len(PROMPT) + 5].tolist()]
    logits = llm.scores[: len(ids)]
    steered = [
        (edits_of(B.seed), [0.0] * 23 + [0.7] * 3 + [0.2] * 3),
        (edits_of(A.seed), [1.0] * 26 + [0.0] * 3),
    ]
    assert np.abs(logits - nested_logits(model, ids, steered)).max() < PARITY


def test_a_control_attached_in_an_answer_steers_the_next_request(model: TinyModel, llm: Llama) -> None:
    with B.on(llm):
        tokens = llm.generate(list(PROMPT), temp=0.0)
        list(islice(tokens, 2))
        A.on(llm)
        list(islice(tokens, 4))
        ids, logits = cached(llm)
        assert np.abs(logits - expected_logits(model, ids, len(PROMPT), [B])).max() < PARITY
        assert_as_alone(model, llm, PROMPT, B, A)


def test_an_answer_cannot_go_on_after_one_of_its_controls_was_removed(model: TinyModel, llm: Llama) -> None:
    with A.on(llm):
        with B.on(llm):
            tokens = llm.generate(list(PROMPT), temp=0.0)
            next(tokens)
        with pytest.raises(SteeringError, match="removed"):
            next(tokens)
        assert_as_alone(model, llm, PROMPT, A)


def test_a_saved_state_goes_on_under_the_same_controls_and_no_others(model: TinyModel, llm: Llama) -> None:
    first, second = B.on(llm), C.on(llm)
    answered = answer(llm, PROMPT)
    state = llm.save_state()
    answer(llm, MORE)

    llm.load_state(state)
    assert llm.n_tokens == len(PROMPT) + N_ANSWER - 1
    llm.eval(answered[-1:])
    expected = expected_logits(model, PROMPT + answered, len(PROMPT), [B, C])
    assert np.abs(cached(llm)[1] - expected).max() < PARITY

    llm.load_state(state)
    second.strength = 1.0
    assert_as_alone(model, llm, PROMPT + answered, B, replace(C, strength=1.0))

    second.remove()
    llm.load_state(state)
    assert llm.n_tokens == len(PROMPT) - 1
    assert_as_alone(model, llm, PROMPT + answered, B)

    C.on(llm)
    llm.load_state(state)
    assert llm.n_tokens == len(PROMPT) + N_ANSWER - 1
    first.remove()
    assert llm.n_tokens == len(PROMPT) - 1
    assert_as_alone(model, llm, PROMPT + answered, C)


def test_embeddings_are_not_steered(model: TinyModel) -> None:
    text = "how do I bake a cake?"
    llm = load(model.gguf, embedding=True, logits_all=False)
    expected = llm.embed(text)
    with A.on(llm), B.on(llm):
        assert llm.embed(text) == expected
    llm.close()


def test_a_second_control_that_is_refused_leaves_the_first_one_as_it_is() -> None:
    gguf = tiny_model(OUT_OF_REACH).gguf
    info, add = ModelInfo.from_gguf(gguf), {1: LayerEdit(add=np.ones(64))}
    never_nested, llm = load(gguf), load(gguf)
    steer(never_nested, ControlFile(info, add), strength=0.5)
    with steer(llm, ControlFile(info, add), strength=0.5):
        with pytest.raises(SteeringError, match="out of reach"):
            steer(llm, ControlFile(info, edits_of(0)))
        with pytest.raises(ControlFileError):
            steer(llm, ControlFile(replace(info, n_embd=32), {1: LayerEdit(add=np.ones(32))}))
        assert answer(llm, PROMPT) == answer(never_nested, PROMPT)
        assert np.array_equal(cached(llm)[1], cached(never_nested)[1])
    llm.close()
    never_nested.close()
