from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from alignez_gguf.conversation import Conversation
from alignez_gguf.engines import Completion, GenerationRequest, Sampling
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.framing import Framing
from alignez_gguf.prompts import Persona, Templates

PERSONA = Persona("{query}", "{query}")
FRAMING = Framing((), Templates("t", "{few_shot}Q: {query}\nA:", "EXAMPLE\n", (), PERSONA, PERSONA))
SAMPLING = Sampling(max_tokens=8)


class FakeEngine:
    """Answers in two pieces with the number of its answer; prompts above `limit` characters do not fit."""

    def __init__(self, limit: int = 1000) -> None:
        self.asked: list[GenerationRequest] = []
        self.limit = limit
        self.interrupt = False

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        on_text: Callable[[int, str], None],
    ) -> Iterator[tuple[int, Completion]]:
        assert sampling is SAMPLING
        (request,) = requests
        if len(request.prompt) > self.limit:
            raise QueryError("the prompt is too long")
        self.asked.append(request)
        return self._answers(len(self.asked), on_text)

    def _answers(self, number: int, on_text: Callable[[int, str], None]) -> Iterator[tuple[int, Completion]]:
        on_text(0, " answer ")
        if self.interrupt:
            raise KeyboardInterrupt
        on_text(0, str(number))
        yield 0, Completion(f" answer {number}", 2, "stop")


def conversation(engine: FakeEngine, strength: float | None = 1.0) -> Conversation:
    return Conversation(engine, FRAMING, SAMPLING, seed=5, strength=strength)  # type: ignore[arg-type]


def prompts(engine: FakeEngine) -> list[str]:
    return [request.prompt for request in engine.asked]


def test_answers_see_the_turns_before_them() -> None:
    engine, shown = FakeEngine(), list[str]()
    talk = conversation(engine)
    assert talk.answer("one", shown.append) == " answer 1"
    talk.answer("two", shown.append)
    assert shown == [" answer ", "1", " answer ", "2"]
    assert prompts(engine) == ["EXAMPLE\nQ: one\nA:", "EXAMPLE\nQ: one\nA: answer 1\n\nQ: two\nA:"]


def test_each_answer_takes_the_next_seed() -> None:
    engine = FakeEngine()
    talk = conversation(engine)
    for message in ("one", "two", "three"):
        talk.answer(message, lambda _: None)
    assert [request.seed for request in engine.asked] == [5, 6, 7]


def test_strength_changes_from_the_next_answer_on() -> None:
    engine = FakeEngine()
    talk = conversation(engine, strength=1.0)
    talk.answer("one", lambda _: None)
    assert talk.set_strength("0.5") == "strength 0.5"
    talk.answer("two", lambda _: None)
    talk.set_strength("0")
    talk.answer("three", lambda _: None)
    assert [request.strength for request in engine.asked] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("text", ["", "much", "-1", "nan", "inf"])
def test_strength_that_is_none_is_refused_and_the_former_stays(text: str) -> None:
    engine = FakeEngine()
    talk = conversation(engine, strength=0.25)
    with pytest.raises(SteeringError):
        talk.set_strength(text)
    talk.answer("one", lambda _: None)
    assert engine.asked[0].strength == 0.25


def test_strength_without_a_control_is_refused_with_the_mend() -> None:
    engine = FakeEngine()
    talk = conversation(engine, strength=None)
    with pytest.raises(SteeringError, match="start the chat with -c FILE"):
        talk.set_strength("1")
    talk.answer("one", lambda _: None)
    assert engine.asked[0].strength == 0.0


def test_reset_forgets_the_turns() -> None:
    engine = FakeEngine()
    talk = conversation(engine)
    talk.answer("one", lambda _: None)
    talk.reset()
    talk.answer("two", lambda _: None)
    assert prompts(engine)[1] == "EXAMPLE\nQ: two\nA:"


def test_interrupted_answer_leaves_no_turn_behind() -> None:
    engine = FakeEngine()
    talk = conversation(engine)
    talk.answer("one", lambda _: None)
    engine.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        talk.answer("two", lambda _: None)
    engine.interrupt = False
    talk.answer("three", lambda _: None)
    assert prompts(engine)[-1] == "EXAMPLE\nQ: one\nA: answer 1\n\nQ: three\nA:"


def test_oldest_turns_are_left_out_where_the_conversation_outgrows_the_context() -> None:
    engine = FakeEngine(limit=len("EXAMPLE\nQ: two\nA: answer 2\n\nQ: three\nA:"))
    talk = conversation(engine)
    for message in ("one", "two", "three"):
        talk.answer(message, lambda _: None)
    assert prompts(engine)[-1] == "EXAMPLE\nQ: two\nA: answer 2\n\nQ: three\nA:"


def test_message_that_is_too_long_alone_is_refused_and_the_turns_stay() -> None:
    engine = FakeEngine(limit=40)
    talk = conversation(engine)
    talk.answer("one", lambda _: None)
    with pytest.raises(QueryError, match="too long"):
        talk.answer("x" * 50, lambda _: None)
    talk.answer("two", lambda _: None)
    assert prompts(engine)[-1] == "EXAMPLE\nQ: one\nA: answer 1\n\nQ: two\nA:"
