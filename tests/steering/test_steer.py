"""steer() on a `llama_cpp.Llama`: every answer equals what PyTorch with forward hooks computes for that
request alone, whatever was asked before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import ControlFileError, RuntimeUnavailableError, SteeringError
from alignez_gguf.runtime import bindings
from alignez_gguf.steering.patched import Patched
from alignez_gguf.steering.steer import steer
from tests.models import OUT_OF_REACH, TinyModel, tiny_model
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

SCOPES = ("generation", "all", "first:2")


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_model("llama")


def edits_of(n_embd: int = 64, n_layer: int = 3, seed: int = 0) -> dict[int, LayerEdit]:
    random = np.random.default_rng(seed).standard_normal
    return {
        layer: LayerEdit(remove=random((2, n_embd)), add=0.3 * random(n_embd)) for layer in range(n_layer)
    }


EDITS = edits_of()


@pytest.fixture(scope="module")
def control(model: TinyModel) -> ControlFile:
    return ControlFile(ModelInfo.from_gguf(model.gguf), EDITS)


def expected_answer(
    model: TinyModel, prompt: Sequence[int], scope: str, strength: float, n_tokens: int = N_ANSWER
) -> list[int]:
    """Greedy tokens of PyTorch, without a cache."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        steered = strengths(scope, strength, len(prompt), len(tokens))
        tokens.append(int(hooked_logits(model, tokens, EDITS, steered)[-1].argmax()))
    return tokens[len(prompt) :]


def assert_as_alone(model: TinyModel, llm: Llama, prompt: Sequence[int], scope: str, strength: float) -> None:
    """Ask, and hold the tokens and the logits of the whole request against PyTorch."""
    answered = answer(llm, prompt)
    tokens, logits = cached(llm)
    expected = hooked_logits(model, tokens, EDITS, strengths(scope, strength, len(prompt), len(tokens)))
    assert tokens == [*prompt, *answered[:-1]]
    assert np.abs(logits - expected).max() < PARITY
    assert answered == expected_answer(model, prompt, scope, strength)


def assert_untouched(llm: Llama, never_steered: Llama) -> None:
    """Ask a new prompt of both, with empty caches, and find no bit that differs."""
    llm.reset()
    never_steered.reset()
    assert answer(llm, MORE) == answer(never_steered, MORE)
    assert same_bits(cached(llm)[1], cached(never_steered)[1])
    assert not set(vars(llm)) - set(vars(never_steered))


def test_scopes_and_strengths_give_different_answers(model: TinyModel) -> None:
    answers = {
        tuple(expected_answer(model, PROMPT, scope, strength))
        for scope, strength in [(SCOPES[0], 0.0), (SCOPES[0], 0.5), *((scope, 1.0) for scope in SCOPES)]
    }
    assert len(answers) == 5, "the other tests could not tell one from the other"


@pytest.mark.parametrize("scope", SCOPES)
def test_strength_zero_is_the_unsteered_model_bit_for_bit(
    llm: Llama, never_steered: Llama, control: ControlFile, scope: str
) -> None:
    with steer(llm, control, strength=0.0, scope=scope):
        for prompt in (PROMPT, PROMPT + MORE, MORE):
            assert answer(llm, prompt) == answer(never_steered, prompt)
            assert same_bits(cached(llm)[1], cached(never_steered)[1])


@pytest.mark.parametrize("scope", SCOPES)
def test_removal_gives_the_unsteered_model_back_bit_for_bit(
    llm: Llama, never_steered: Llama, control: ControlFile, scope: str
) -> None:
    with steer(llm, control, scope=scope):
        first = answer(llm, PROMPT)
        answer(llm, PROMPT + first + MORE)

    assert_untouched(llm, never_steered)


@pytest.mark.parametrize(("scope", "n_kept"), [("generation", 23), ("all", 0), ("first:2", 23)])
def test_removal_leaves_the_unsteered_part_of_the_prompt_in_the_cache(
    llm: Llama, never_steered: Llama, control: ControlFile, scope: str, n_kept: int
) -> None:
    with steer(llm, control, scope=scope):
        answer(llm, PROMPT)

    assert llm.n_tokens == n_kept
    # A model that computed the same prompt in the same batch, and then cut its cache at the same place.
    never_steered.eval(PROMPT)
    never_steered.n_tokens = n_kept
    assert answer(llm, PROMPT + MORE) == answer(never_steered, PROMPT + MORE)
    assert same_bits(cached(llm)[1][n_kept:], cached(never_steered)[1][n_kept:])


@pytest.mark.parametrize("scope", SCOPES)
def test_every_request_of_a_chat_is_answered_as_if_it_were_alone(
    model: TinyModel, llm: Llama, control: ControlFile, scope: str
) -> None:
    answer(llm, PROMPT)  # the cache holds an unsteered answer
    with steer(llm, control, scope=scope) as steering:
        assert_as_alone(model, llm, PROMPT, scope, 1.0)
        chat = PROMPT + expected_answer(model, PROMPT, scope, 1.0) + MORE
        for strength, prompt in [
            (0.5, chat),  # contains an answer of another strength
            (0.5, chat),  # repeated
            (1.0, chat),
            (0.0, chat),
            (1.0, PROMPT),  # a prefix of what is cached
            (1.0, PROMPT),
            (1.0, PROMPT[:10]),
            (0.5, PROMPT[:10] + MORE),
        ]:
            steering.strength = strength
            assert_as_alone(model, llm, prompt, scope, strength)
    assert_as_alone(model, llm, chat, scope, 0.0)


def test_a_repeated_prompt_is_answered_anew_after_a_change_of_strength(
    model: TinyModel, llm: Llama, control: ControlFile
) -> None:
    # One token leaves exactly the prompt in the cache, whose last logits Llama would sample from again.
    with steer(llm, control) as steering:
        for strength in (1.0, 1.0, 0.0, 0.5):
            steering.strength = strength
            assert answer(llm, PROMPT, 1) == expected_answer(model, PROMPT, "generation", strength, 1)


@pytest.mark.parametrize(
    ("scope", "strength", "n_reused"),
    [
        ("generation", 1.0, len(PROMPT) - 1),
        ("generation", 0.5, len(PROMPT) - 1),
        ("first:2", 1.0, len(PROMPT) - 1),
        ("all", 1.0, len(PROMPT) + N_ANSWER - 1),
        ("all", 0.5, 0),
    ],
)
def test_a_chat_computes_again_only_what_was_computed_under_other_strengths(
    llm: Llama,
    control: ControlFile,
    monkeypatch: pytest.MonkeyPatch,
    scope: str,
    strength: float,
    n_reused: int,
) -> None:
    with steer(llm, control, scope=scope) as steering:
        chat = PROMPT + answer(llm, PROMPT) + MORE
        sizes: list[int] = []
        decode = llm._ctx.decode

        def counted(batch: Any) -> None:
            sizes.append(batch.batch.n_tokens)
            decode(batch)

        monkeypatch.setattr(llm._ctx, "decode", counted)
        steering.strength = strength
        answer(llm, chat, 1)
        assert sum(sizes) == len(chat) - n_reused


def test_a_change_of_scope_holds_from_the_next_request_on(
    model: TinyModel, llm: Llama, control: ControlFile
) -> None:
    with steer(llm, control) as steering:
        for scope in (*SCOPES, *SCOPES[::-1]):
            steering.scope = scope
            assert str(steering.scope) == scope
            assert_as_alone(model, llm, PROMPT, scope, 1.0)


def test_a_change_of_strength_in_an_answer_holds_from_the_next_token_on(
    model: TinyModel, llm: Llama, control: ControlFile
) -> None:
    with steer(llm, control, strength=1.0) as steering:
        tokens = llm.generate(list(PROMPT), temp=0.0)
        for strength, n_tokens in [(1.0, 3), (0.5, 4), (0.0, 2)]:
            steering.strength = strength
            list(islice(tokens, n_tokens))
        ids, logits = cached(llm)
        # The first token comes of the prompt's last one, so three tokens are that one and two more.
        by_token = [0.0] * 23 + [1.0] * 3 + [0.5] * 4 + [0.0] * 2
        assert np.abs(logits - hooked_logits(model, ids, EDITS, by_token)).max() < PARITY

        steering.strength = 0.5
        assert_as_alone(model, llm, PROMPT, "generation", 0.5)


def test_an_answer_cannot_go_on_after_the_steering_was_removed(
    llm: Llama, never_steered: Llama, control: ControlFile
) -> None:
    with steer(llm, control):
        tokens = llm.generate(list(PROMPT), temp=0.0)
        next(tokens)

    with pytest.raises(SteeringError, match="removed"):
        next(tokens)
    assert_untouched(llm, never_steered)


def test_low_level_evaluation_is_steered_beside_an_unfinished_answer(
    model: TinyModel, llm: Llama, control: ControlFile
) -> None:
    with steer(llm, control):
        unfinished = llm.generate(list(MORE), temp=0.0)
        next(unfinished)
        llm.reset()

        llm.eval(list(PROMPT))
        llm.eval(MORE[:1])
        llm.eval(MORE[1:2])

        expected = hooked_logits(model, PROMPT + MORE[:2], EDITS, [0.0] * 23 + [1.0] * 3)
        assert np.abs(cached(llm)[1] - expected).max() < PARITY


def test_completions_streams_and_chats_are_steered(
    model: TinyModel, llm: Llama, control: ControlFile, tmp_path: Path
) -> None:
    def expected(response: Any) -> str:
        """What PyTorch answers to the prompt of this response, in as many tokens."""
        usage = response["usage"]
        prompt = llm.input_ids[: usage["prompt_tokens"]].tolist()
        tokens = expected_answer(model, prompt, "generation", 0.5, usage["completion_tokens"])
        assert llm.token_eos() not in tokens
        text: str = llm.detokenize(tokens).decode(errors="ignore")
        return text

    text = "Question: how do I bake a cake?\nAnswer:"
    control.save(tmp_path / "control.gguf")
    options: dict[str, Any] = {"max_tokens": N_ANSWER, "temperature": 0.0}
    with steer(llm, tmp_path / "control.gguf", strength=0.5):
        whole = llm(text, **options)
        assert whole["choices"][0]["text"] == expected(whole)

        parts = llm.create_completion(text, stream=True, **options)
        assert "".join(part["choices"][0]["text"] for part in parts) == expected(whole)

        chat = llm.create_chat_completion([{"role": "user", "content": text}], **options)
        assert chat["choices"][0]["message"]["content"] == expected(chat)


def test_models_that_are_steered_in_two_threads_answer_as_if_each_were_alone(
    model: TinyModel, control: ControlFile
) -> None:
    def ask(strength: float) -> list[list[int]]:
        llm = load(model.gguf)
        answers = []
        for _ in range(20):
            with steer(llm, control, strength=strength, scope="all"):
                answers.append(answer(llm, PROMPT))
        llm.close()
        return answers

    with ThreadPoolExecutor(2) as threads:
        answered = list(threads.map(ask, [0.5, 1.0]))

    for strength, answers in zip([0.5, 1.0], answered, strict=True):
        assert answers == [expected_answer(model, PROMPT, "all", strength)] * 20


def test_embeddings_are_not_steered(model: TinyModel, control: ControlFile) -> None:
    texts = ["how do I bake a cake?", "Answer: make a plan", "dogs sleep"]
    plain = load(model.gguf, embedding=True, logits_all=False)
    expected = plain.embed(texts)
    plain.close()

    llm = load(model.gguf, embedding=True, logits_all=False)
    with steer(llm, control, scope="all"):
        assert llm.embed(texts) == expected
        assert [item["embedding"] for item in llm.create_embedding(texts)["data"]] == expected
    llm.close()


def test_a_saved_state_goes_on_under_the_same_edits(
    model: TinyModel, llm: Llama, control: ControlFile
) -> None:
    with steer(llm, control) as steering:
        first = answer(llm, PROMPT)
        state = llm.save_state()
        answer(llm, MORE)

        llm.load_state(state)

        assert llm.n_tokens == len(PROMPT) + N_ANSWER - 1
        llm.eval(first[-1:])
        expected = hooked_logits(model, PROMPT + first, EDITS, [0.0] * 23 + [1.0] * (N_ANSWER + 1))
        assert np.abs(cached(llm)[1] - expected).max() < PARITY

        llm.load_state(state)
        steering.strength = 0.5
        assert_as_alone(model, llm, PROMPT + first + MORE, "generation", 0.5)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_saved_state_steers_no_other_model_or_control(
    model: TinyModel, llm: Llama, never_steered: Llama, control: ControlFile, scope: str
) -> None:
    other = ControlFile(control.model, edits_of(seed=1))
    with steer(llm, other, scope=scope):
        first = answer(llm, PROMPT)
        state = llm.save_state()

    llm.load_state(state)
    assert_as_alone(model, llm, PROMPT + first, scope, 0.0)
    never_steered.load_state(state)
    assert_as_alone(model, never_steered, PROMPT + first, scope, 0.0)
    with steer(llm, control, scope=scope):
        llm.load_state(state)
        assert_as_alone(model, llm, PROMPT + first, scope, 1.0)


def test_the_cache_of_states_leaks_nothing(model: TinyModel, llm: Llama, control: ControlFile) -> None:
    def expected(prompt: list[int], strength: float) -> list[int]:
        return expected_answer(model, prompt, "all", strength)

    assert_cache_of_states_leaks_nothing(llm, control, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, "not negative"),
        ({"strength": float("nan")}, "finite"),
        ({"strength": float("inf")}, "finite"),
        ({"scope": "prompt"}, "scope 'prompt'"),
        ({"scope": "first:0"}, "scope 'first:0'"),
        ({"runtime": "gpu"}, "runtime 'gpu'"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_and_nothing_is_steered(
    llm: Llama, never_steered: Llama, control: ControlFile, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteeringError, match=message):
        steer(llm, control, **options)
    assert_untouched(llm, never_steered)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_bad_change_of_strength_is_refused_and_the_former_one_stays(
    model: TinyModel, llm: Llama, control: ControlFile, strength: float
) -> None:
    with steer(llm, control, strength=0.5) as steering:
        with pytest.raises(SteeringError):
            steering.strength = strength
        with pytest.raises(SteeringError):
            steering.scope = "nowhere"
        assert steering.strength == 0.5
        assert_as_alone(model, llm, PROMPT, "generation", 0.5)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("llama", {"n_layer": 2}), ("llama", {"n_embd": 128}), ("qwen2", {})],
    ids=["layers", "width", "architecture"],
)
def test_a_control_for_another_model_is_refused_and_nothing_is_steered(
    llm: Llama, never_steered: Llama, architecture: str, shape: dict[str, int]
) -> None:
    other = ModelInfo.from_gguf(tiny_model(architecture, **shape).gguf)

    with pytest.raises(ControlFileError, match="use one made for this model"):
        steer(llm, ControlFile(other, edits_of(other.n_embd, 1)))
    assert_untouched(llm, never_steered)


def test_a_missing_control_file_is_refused_and_nothing_is_steered(
    llm: Llama, never_steered: Llama, tmp_path: Path
) -> None:
    with pytest.raises(ControlFileError, match=r"missing\.gguf"):
        steer(llm, tmp_path / "missing.gguf")
    assert_untouched(llm, never_steered)


def test_an_edit_out_of_reach_is_refused_and_nothing_is_steered() -> None:
    gguf = tiny_model(OUT_OF_REACH).gguf
    llm, never_steered = load(gguf), load(gguf)

    with pytest.raises(SteeringError, match="out of reach"):
        steer(llm, ControlFile(ModelInfo.from_gguf(gguf), EDITS))

    assert_untouched(llm, never_steered)
    llm.close()
    never_steered.close()


def test_an_unpatched_library_is_refused_with_the_mend(
    llm: Llama, never_steered: Llama, control: ControlFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(bindings, "is_patched", lambda: False)
        with pytest.raises(RuntimeUnavailableError, match="alignez-gguf runtime build"):
            steer(llm, control)
    assert_untouched(llm, never_steered)


def test_a_model_can_be_steered_again(model: TinyModel, llm: Llama, control: ControlFile) -> None:
    with steer(llm, control):
        assert_as_alone(model, llm, PROMPT, "generation", 1.0)
    with steer(llm, control, strength=0.5):
        assert_as_alone(model, llm, PROMPT, "generation", 0.5)


def test_a_removal_that_fails_leaves_the_model_unsteered(
    llm: Llama, never_steered: Llama, control: ControlFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Patched) -> None:
        raise SteeringError("out of memory")

    steering = steer(llm, control, scope="all")
    answer(llm, PROMPT)
    monkeypatch.setattr(Patched, "detach", fail)
    with pytest.raises(SteeringError, match="out of memory"):
        steering.remove()

    assert_untouched(llm, never_steered)


def test_a_removed_steering_does_nothing_more(
    model: TinyModel, llm: Llama, never_steered: Llama, control: ControlFile
) -> None:
    removed = steer(llm, control)
    removed.remove()
    removed.remove()
    with pytest.raises(SteeringError, match="removed"):
        removed.strength = 0.5
    with steer(llm, control):
        removed.remove()
        assert_as_alone(model, llm, PROMPT, "generation", 1.0)
    assert_untouched(llm, never_steered)


def test_an_exception_in_the_block_removes_the_steering(
    llm: Llama, never_steered: Llama, control: ControlFile
) -> None:
    with pytest.raises(ZeroDivisionError), steer(llm, control):  # noqa: PT012
        answer(llm, PROMPT)
        raise ZeroDivisionError
    assert_untouched(llm, never_steered)


def test_a_closed_model_cannot_be_steered(model: TinyModel, control: ControlFile) -> None:
    llm = load(model.gguf)
    llm.close()
    with pytest.raises(SteeringError, match="closed"):
        steer(llm, control)


def test_a_model_may_be_closed_while_it_is_steered(model: TinyModel, control: ControlFile) -> None:
    llm = load(model.gguf)
    with steer(llm, control) as steering:
        tokens = llm.generate(list(PROMPT), temp=0.0)
        next(tokens)
        llm.close()
        with pytest.raises(SteeringError, match="closed"):
            steering.strength = 0.5
        with pytest.raises(SteeringError, match="closed"):
            next(tokens)


def test_scope_is_by_default_the_one_that_the_file_was_chosen_for(llm: Llama, control: ControlFile) -> None:
    for recipe, expected in (({}, "generation"), ({"scope": "first:2"}, "first:2")):
        chosen = ControlFile(control.model, control.edits, recipe=recipe)
        with steer(llm, chosen) as steering:
            assert str(steering.scope) == expected
        with steer(llm, chosen, scope="all") as steering:
            assert str(steering.scope) == "all"
