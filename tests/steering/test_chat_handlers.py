"""steer() under a chat handler that evaluates a prompt in parts and puts images into the KV cache by itself.

MTMDChatHandler in llama_cpp/llama_chat_format.py does so: text through `Llama.eval`, images through
llama.cpp, and then the token ids of all, of which those of an image mean nothing, to `create_completion`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import llama_cpp
import numpy as np
import pytest
import torch
from llama_cpp import Llama
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import SteeringError
from alignez_gguf.steering.steer import steer
from tests.models import TinyModel, tiny_model
from tests.runtime.oracle import hooked_logits
from tests.steering.asking import MORE, N_ANSWER, PARITY, PROMPT, answer, load, strengths

N_IMAGE = 7
IMAGE = np.random.default_rng(5).standard_normal((N_IMAGE, 64)).astype(np.float32)
PARTS: list[Any] = [PROMPT[:9], IMAGE, PROMPT[9:16], IMAGE[::-1].copy(), PROMPT[16:]]
RANDOM = np.random.default_rng(0).standard_normal
EDITS = {layer: LayerEdit(remove=RANDOM((2, 64)), add=0.3 * RANDOM(64)) for layer in range(1, 3)}

Runtime = Literal["patched", "stock"]
with_each_runtime = pytest.mark.parametrize("runtime", ["patched", "stock"])


def see(llm: Any, image: NDArray[np.float32]) -> None:
    """Decode embeddings behind what the cache holds."""
    batch = llama_cpp.llama_batch_init(len(image), image.shape[1], 1)
    ctypes.memmove(batch.embd, image.ctypes.data, image.nbytes)
    batch.n_tokens = len(image)
    for index in range(len(image)):
        batch.pos[index] = llm.n_tokens + index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = False
    assert llama_cpp.llama_decode(llm._ctx.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)
    llm.n_tokens += len(image)


class Handler:
    """Answers a conversation, whatever it is, from `parts`: token ids and images."""

    def __init__(self) -> None:
        self.parts = PARTS
        self.before_answer: Callable[[], None] = lambda: None

    def __call__(self, *, llama: Any, **_: Any) -> Any:
        llama.reset()
        llama._ctx.kv_cache_clear()
        for part in self.parts:
            if isinstance(part, list):
                llama.eval(part)
            else:
                see(llama, part)
        self.before_answer()
        prompt = llama.input_ids[: llama.n_tokens].tolist()
        return llama.create_completion(prompt, max_tokens=N_ANSWER, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def control(model: TinyModel) -> ControlFile:
    return ControlFile(ModelInfo.from_gguf(model.gguf), EDITS)


@pytest.fixture
def llm(model: TinyModel) -> Iterator[Llama]:
    llm = load(model.gguf, chat_handler=Handler())
    yield llm
    llm.close()


def ask(llm: Any) -> list[int]:
    """The tokens of an answer; the last one is not in the cache."""
    n_prompt = sum(map(len, llm.chat_handler.parts))
    llm.create_chat_completion([{"role": "user", "content": "look"}])
    answered: list[int] = llm.input_ids[n_prompt : llm.n_tokens].tolist()
    return answered


def expected(
    model: TinyModel, parts: Sequence[Any], scope: str, strength: float
) -> tuple[list[int], NDArray[np.float32]]:
    """What PyTorch answers, and the logits of all that it read and said."""
    embed = model.hf.get_input_embeddings()
    with torch.no_grad():
        seen = torch.cat([embed(torch.tensor(p)) if isinstance(p, list) else torch.tensor(p) for p in parts])
    n_prompt, said = len(seen), []
    while True:
        steered = strengths(scope, strength, n_prompt, len(seen))
        logits = hooked_logits(model, seen, EDITS, steered)
        if len(said) == N_ANSWER - 1:
            return said, logits
        said.append(int(logits[-1].argmax()))
        with torch.no_grad():
            seen = torch.cat([seen, embed(torch.tensor(said[-1:]))])


def assert_as_pytorch(model: TinyModel, llm: Any, scope: str, strength: float) -> None:
    said, logits = expected(model, llm.chat_handler.parts, scope, strength)
    assert ask(llm) == said
    n_prompt = sum(map(len, llm.chat_handler.parts))
    assert np.abs(llm.scores[n_prompt - 1 : llm.n_tokens] - logits[n_prompt - 1 :]).max() < PARITY


@with_each_runtime
@pytest.mark.parametrize("scope", ["generation", "all", "first:2"])
def test_answers_about_images_are_steered_as_forward_hooks_do(
    model: TinyModel, llm: Llama, control: ControlFile, scope: str, runtime: Runtime
) -> None:
    with steer(llm, control, strength=0.7, scope=scope, runtime=runtime) as steering:
        assert_as_pytorch(model, llm, scope, 0.7)
        assert_as_pytorch(model, llm, scope, 0.7)
        steering.strength = 0.0
        assert_as_pytorch(model, llm, scope, 0.0)
        steering.strength = 1.0
        assert_as_pytorch(model, llm, scope, 1.0)
    assert_as_pytorch(model, llm, scope, 0.0)


@with_each_runtime
def test_an_image_at_the_beginning_is_steered_by_the_scope_of_all_tokens(
    model: TinyModel, llm: Any, control: ControlFile, runtime: Runtime
) -> None:
    llm.chat_handler.parts = [IMAGE, PROMPT]
    for scope in ("generation", "all"):
        with steer(llm, control, strength=0.7, scope=scope, runtime=runtime):
            for _ in range(2):
                assert_as_pytorch(model, llm, scope, 0.7)


def test_an_image_and_its_text_change_the_answer(model: TinyModel) -> None:
    """The other tests could not tell otherwise."""
    without = [part for part in PARTS if isinstance(part, list)]
    answers = [
        expected(model, parts, scope, strength)[0]
        for parts, scope, strength in (
            (PARTS, "generation", 0.7),
            (PARTS, "all", 0.7),
            (PARTS, "generation", 0.0),
            (without, "generation", 0.7),
        )
    ]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_a_prompt_with_an_image_that_would_be_computed_again_is_an_error(
    llm: Any, control: ControlFile
) -> None:
    with steer(llm, control, scope="all") as steering:

        def change() -> None:
            steering.strength = 0.5

        llm.chat_handler.before_answer = change
        with pytest.raises(SteeringError, match="ask again through the chat handler"):
            ask(llm)


def test_a_text_with_the_ids_of_an_image_is_not_answered_about_the_image(
    model: TinyModel, llm: Any, control: ControlFile
) -> None:
    llm.input_ids[:] = MORE[0]  # where an image lies, the ids of what was asked before stay
    with steer(llm, control):
        ask(llm)
        ids = llm.input_ids[: llm.n_tokens].tolist()[:-2] + MORE
        said = answer(llm, ids)
        seen = [*ids, *said[:-1]]
        logits = hooked_logits(model, seen, EDITS, strengths("generation", 1.0, len(ids), len(seen)))

    assert np.abs(llm.scores[len(ids) - 1 : len(seen)] - logits[len(ids) - 1 :]).max() < PARITY


def assert_goes_on_as_pytorch(
    model: TinyModel, llm: Any, said: Sequence[int], scope: str, strength: float
) -> None:
    """A prompt of all that the cache holds and of `MORE`, asked without the chat handler."""
    prompt = [*llm.input_ids[: llm.n_tokens].tolist(), *MORE]
    more = answer(llm, prompt)
    embed = model.hf.get_input_embeddings()
    parts = [*llm.chat_handler.parts, [*said, *MORE, *more[:-1]]]
    with torch.no_grad():
        seen = torch.cat([embed(torch.tensor(p)) if isinstance(p, list) else torch.tensor(p) for p in parts])
    logits = hooked_logits(model, seen, EDITS, strengths(scope, strength, len(prompt), len(seen)))
    assert np.abs(llm.scores[len(prompt) - 1 : len(seen)] - logits[len(prompt) - 1 :]).max() < PARITY


@with_each_runtime
@pytest.mark.parametrize("scope", ["generation", "all", "first:2"])
def test_a_prompt_that_goes_on_from_an_answer_about_an_image_still_holds_the_image(
    model: TinyModel, llm: Llama, control: ControlFile, scope: str, runtime: Runtime
) -> None:
    with steer(llm, control, strength=0.7, scope=scope, runtime=runtime):
        assert_goes_on_as_pytorch(model, llm, ask(llm), scope, 0.7)


def test_what_was_seen_before_the_model_is_steered_is_not_forgotten(
    model: TinyModel, llm: Llama, control: ControlFile
) -> None:
    said = ask(llm)
    state = llm.save_state()
    with steer(llm, control, scope="all"):
        prompt = [*llm.input_ids[: llm.n_tokens].tolist(), *MORE]
        for _ in range(2):
            with pytest.raises(SteeringError, match="ask again through the chat handler"):
                answer(llm, prompt)
            llm.load_state(state)
    llm.load_state(state)
    with steer(llm, control, scope="generation", strength=0.7):
        assert_goes_on_as_pytorch(model, llm, said, "generation", 0.7)


def test_a_longer_image_than_the_text_before_the_last_one_is_seen_as_a_whole(
    model: TinyModel, llm: Any, control: ControlFile
) -> None:
    llm.input_ids[:] = MORE[0]
    with steer(llm, control):
        ask(llm)
        llm.chat_handler.parts = [np.concatenate([IMAGE, IMAGE]), PROMPT]
        ask(llm)
        ids = [*llm.input_ids[: len(PARTS[0])].tolist(), *MORE]
        said = answer(llm, ids)
        seen = [*ids, *said[:-1]]
        logits = hooked_logits(model, seen, EDITS, strengths("generation", 1.0, len(ids), len(seen)))

    assert np.abs(llm.scores[len(ids) - 1 : len(seen)] - logits[len(ids) - 1 :]).max() < PARITY


def test_no_token_is_drawn_by_hand_after_what_is_taken_for_a_part_of_a_prompt(
    model: TinyModel, llm: Llama, control: ControlFile
) -> None:
    with steer(llm, control, scope="generation") as steering:
        llm.eval(PROMPT)
        with pytest.raises(SteeringError, match="use generate"):
            llm.sample(temp=0.0)
        steering.strength = 0.0
        assert llm.sample(temp=0.0) == hooked_logits(model, PROMPT, {})[-1].argmax()
    with steer(llm, control, scope="all"):
        llm.reset()
        llm.eval(PROMPT)
        assert llm.sample(temp=0.0) == hooked_logits(model, PROMPT, EDITS)[-1].argmax()
    assert llm.sample.__func__ is Llama.sample
