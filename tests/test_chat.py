from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf.chat import Conversation
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.base import Completion, GenerationRequest, Sampling
from alignez_gguf.errors import ControlFileError, OutputError, QueryError, SteeringError
from alignez_gguf.prompts.chat_template import ChatTemplate
from alignez_gguf.prompts.templates import Persona, Templates

PERSONA = Persona("{query}", "{query}")
FRAMING = ChatTemplate(Templates("t", "{few_shot}Q: {query}\nA:", "EXAMPLE\n", (), PERSONA, PERSONA))
SAMPLING = Sampling(max_tokens=8)


class FakeEngine:
    """Answers in two pieces with the number of its answer; prompts above `limit` characters do not fit."""

    info = ModelInfo("llama", 4, 2)

    def __init__(self, limit: int = 1000) -> None:
        self.edited: list[tuple[dict[int, LayerEdit], str]] = []
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
        if len(requests[0].prompt) > self.limit:
            raise QueryError("the prompt is too long")
        first = len(self.asked) + 1
        self.asked += requests
        return self._answers(first, len(requests), on_text)

    def _answers(
        self, first: int, count: int, on_text: Callable[[int, str], None]
    ) -> Iterator[tuple[int, Completion]]:
        for index in reversed(range(count)):  # the first one takes longest
            on_text(index, " answer ")
            if self.interrupt:
                raise KeyboardInterrupt
            on_text(index, str(first + index))
            yield index, Completion(f" answer {first + index}", 2, "stop")

    def set_edits(self, edits: Edits, scope: str | Scope = "generation", gate: Gate | None = None) -> None:
        self.edited.append((dict(edits), str(scope)))
        self.gate = gate


CONTROL = ControlFile(ModelInfo("llama", 4, 2), {1: LayerEdit(add=np.ones(4))})
OTHER = ControlFile(ModelInfo("llama", 4, 2), {0: LayerEdit(add=np.ones(4))}, recipe={"scope": "first:3"})


def conversation(
    engine: FakeEngine, strength: float = 1.0, control: ControlFile | None = CONTROL
) -> Conversation:
    return Conversation(engine, FRAMING, SAMPLING, seed=5, control=control, strength=strength)


def prompts(engine: FakeEngine) -> list[str]:
    return [request.prompt for request in engine.asked]


def test_answers_see_the_turns_before_them() -> None:
    engine, shown = FakeEngine(), list[str]()
    talk = conversation(engine)
    assert talk.answer("one", shown.append) == Completion(" answer 1", 2, "stop")
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
    talk = conversation(engine, control=None)
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


def test_compare_asks_both_from_one_prompt_and_goes_on_from_the_steered_answer() -> None:
    engine, shown = FakeEngine(), list[tuple[int, str]]()
    talk = conversation(engine, strength=0.7)
    base, steered = talk.compare("one", lambda number, piece: shown.append((number, piece)))
    assert (base.text, steered.text) == (" answer 1", " answer 2")
    assert [(request.strength, request.seed) for request in engine.asked] == [(0.0, 5), (0.7, 5)]
    assert len({*prompts(engine)}) == 1
    assert sorted(shown) == [(0, " answer "), (0, "1"), (1, " answer "), (1, "2")]
    talk.answer("two", lambda _: None)
    assert prompts(engine)[-1] == "EXAMPLE\nQ: one\nA: answer 2\n\nQ: two\nA:"


def test_compare_without_a_control_is_refused() -> None:
    with pytest.raises(SteeringError, match="/control FILE"):
        conversation(FakeEngine(), control=None).compare("one", lambda *_: None)


def test_system_message_comes_before_the_conversation_until_it_is_taken_away() -> None:
    engine = FakeEngine()
    talk = conversation(engine)
    talk.set_system("Be kind.")
    talk.answer("one", lambda _: None)
    talk.set_system("")
    talk.answer("two", lambda _: None)
    assert prompts(engine)[0] == "Be kind.\n\nEXAMPLE\nQ: one\nA:"
    assert prompts(engine)[1].startswith("EXAMPLE")


def test_scope_is_that_of_the_control_until_another_is_given(tmp_path: Path) -> None:
    engine = FakeEngine()
    OTHER.save(tmp_path / "other.gguf")
    talk = conversation(engine)
    talk.set_control(str(tmp_path / "other.gguf"))
    talk.set_scope("all")
    talk.set_control(str(tmp_path / "other.gguf"))
    assert [scope for _, scope in engine.edited] == ["generation", "first:3", "all", "all"]
    assert [list(edits) for edits, _ in engine.edited] == [[1], [0], [0], [0]]
    with pytest.raises(SteeringError, match="unknown"):
        talk.set_scope("last")


def test_control_that_cannot_be_used_leaves_the_former_one(tmp_path: Path) -> None:
    engine = FakeEngine()
    talk = conversation(engine, strength=0.3)
    ControlFile(ModelInfo("llama", 8, 2), {1: LayerEdit(add=np.ones(8))}).save(tmp_path / "wide.gguf")
    for name in ("missing.gguf", "wide.gguf"):
        with pytest.raises(ControlFileError):
            talk.set_control(str(tmp_path / name))
    assert len(engine.edited) == 1
    talk.answer("one", lambda _: None)
    assert engine.asked[-1].strength == 0.3


def test_control_can_come_later(tmp_path: Path) -> None:
    engine = FakeEngine()
    OTHER.save(tmp_path / "other.gguf")
    talk = conversation(engine, control=None)
    talk.answer("one", lambda _: None)
    talk.set_control(str(tmp_path / "other.gguf"))
    talk.answer("two", lambda _: None)
    assert [request.strength for request in engine.asked] == [0.0, 1.0]


def test_saved_conversation_has_a_message_a_line(tmp_path: Path) -> None:
    talk = conversation(FakeEngine(), strength=0.5)
    talk.set_system("Be kind.")
    talk.answer("größer", lambda _: None)
    talk.compare("two", lambda *_: None)
    assert talk.save(str(tmp_path / "talk.jsonl")).startswith("saved 5 messages")
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text("utf-8").splitlines()]
    steered = {"strength": 0.5, "scope": "generation"}
    assert rows == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "größer"},
        {"role": "assistant", "content": "answer 1", **steered},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "answer 3", **steered, "base": "answer 2"},
    ]
    with pytest.raises(OutputError):
        talk.save(str(tmp_path / "missing" / "talk.jsonl"))
    with pytest.raises(QueryError, match=r"/save talk\.jsonl"):
        talk.save("")


def test_gate_of_a_control_goes_with_its_edits(tmp_path: Path) -> None:
    engine = FakeEngine()
    gate = Gate(np.array([1, 2], np.int32), np.ones(2, np.float32), 0.5)
    talk = conversation(engine, control=replace(CONTROL, gate=gate))
    assert engine.gate is gate
    talk.set_scope("first:2")
    assert engine.gate is gate
    path = tmp_path / "other.gguf"
    OTHER.save(path)
    talk.set_control(str(path))
    assert engine.gate is None


def test_answer_behind_a_closed_gate_is_told_and_saved_as_unsteered(tmp_path: Path) -> None:
    gate = Gate(np.array([1, 2], np.int32), np.ones(2, np.float32), 0.5)
    for control, told, strength in ((replace(CONTROL, gate=gate), True, 0.0), (CONTROL, False, 1.0)):
        talk = conversation(FakeEngine(), control=control)
        assert talk.is_closed(talk.answer("one", lambda _: None)) == told
        talk.save(str(tmp_path / "talk.jsonl"))
        answer = json.loads((tmp_path / "talk.jsonl").read_text().splitlines()[-1])
        assert answer["strength"] == strength
        talk.set_strength("0")
        assert not talk.is_closed(talk.answer("two", lambda _: None))
