"""A conversation with a model whose steering can change between the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import Edits, check_strength
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.base import Completion, GenerationRequest, Generator, Sampling
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.prompts.chat_template import ChatTemplate
from alignez_gguf.storage.atomic import write_text

_NO_CONTROL = "no control file was given; start the chat with -c FILE, or write /control FILE"


class EditableEngine(Generator, Protocol):
    """An engine whose edits can be set."""

    @property
    def info(self) -> ModelInfo: ...

    def set_edits(
        self, edits: Edits, scope: str | Scope = "generation", gate: Gate | None = None
    ) -> None: ...


@dataclass(frozen=True)
class Exchange:
    """A message, its answer, and how that was steered.

    Attributes:
        strength: 0 where a gate stayed closed.
        base: the unsteered answer, where both were asked for.
    """

    message: str
    answer: str
    strength: float
    scope: str
    base: str | None = None


class Conversation:
    """Keeps the turns, and answers the next message.

    Args:
        engine: its edits are set from the control.
        framing: how the turns become a prompt.
        sampling: how tokens of the answers are drawn.
        seed: the seed of the first answer; each further message takes the next one.
        control: steers the answers; may come later.
        strength: the strength of the answers to come.
        scope: which tokens are steered; default: those that the control was chosen for.

    Raises:
        AlignezError: the control does not fit the model, or cannot be applied.
    """

    def __init__(
        self,
        engine: EditableEngine,
        framing: ChatTemplate,
        sampling: Sampling,
        seed: int,
        control: ControlFile | None = None,
        strength: float = 1.0,
        scope: Scope | None = None,
    ) -> None:
        self._engine = engine
        self._framing = framing
        self._sampling = sampling
        self._seed = seed
        self._strength = check_strength(strength)
        self._given_scope = scope
        self._control: ControlFile | None = None
        self._system = ""
        self._exchanges: list[Exchange] = []
        if control is not None:
            self._steer(control, scope)

    def answer(self, message: str, show: Callable[[str], None]) -> Completion:
        """Answer a message; `show` gets each new piece of text. An interrupted answer leaves no turn behind.

        When the conversation outgrows the context, its oldest turns are left out.

        Raises:
            QueryError: the message alone is too long.
        """
        strength = self._strength if self._control else 0.0
        (completion,) = self._complete(message, [strength], lambda _, piece: show(piece))
        return completion

    def compare(self, message: str, show: Callable[[int, str], None]) -> tuple[Completion, Completion]:
        """Answer a message unsteered (0) and steered (1) at the same time, from one prompt.

        The conversation goes on from the steered answer. `show` gets the number with each piece of text.

        Raises:
            SteeringError: there is no control.
            QueryError: the message alone is too long.
        """
        if self._control is None:
            raise SteeringError(_NO_CONTROL)
        base, steered = self._complete(message, [0.0, self._strength], show)
        return base, steered

    def is_closed(self, completion: Completion) -> bool:
        """Whether the gate of the control stayed closed for an answer, so that it is the base model's."""
        has_gate = self._control is not None and self._control.gate is not None
        return has_gate and self._strength > 0 and not completion.steered

    def set_strength(self, text: str) -> str:
        """Change the strength from the next answer on. Raises `SteeringError`."""
        if self._control is None:
            raise SteeringError(_NO_CONTROL)
        try:
            self._strength = check_strength(float(text))
        except ValueError as error:
            raise SteeringError(f"{text!r} is not a number; write /strength 0.7") from error
        return f"strength {self._strength:g}"

    def set_scope(self, text: str) -> str:
        """Change which tokens are steered, from the next answer on. Raises `SteeringError`."""
        if self._control is None:
            raise SteeringError(_NO_CONTROL)
        self._steer(self._control, Scope.parse(text))
        return f"scope {text}"

    def set_control(self, path: str) -> str:
        """Steer by another control file from the next answer on. Raises `AlignezError`, changing nothing."""
        self._steer(ControlFile.load(path), self._given_scope)
        return f"steered by {path}, strength {self._strength:g}, scope {self._scope}"

    def set_system(self, text: str) -> str:
        """Put a text before the conversation; an empty one takes it away."""
        self._system = text
        return "system message set" if text else "no system message"

    def reset(self) -> str:
        """Forget all turns."""
        self._exchanges = []
        return "forgotten"

    def save(self, path: str) -> str:
        """Write the turns as JSONL, a message a line. Raises `AlignezError`."""
        if not path:
            raise QueryError("say where to save the conversation: /save talk.jsonl")
        rows: list[dict[str, object]] = []
        if self._system:
            rows.append({"role": "system", "content": self._system})
        for exchange in self._exchanges:
            rows.append({"role": "user", "content": exchange.message})
            answer = {
                "role": "assistant",
                "content": exchange.answer,
                "strength": exchange.strength,
                "scope": exchange.scope,
            }
            rows.append(answer if exchange.base is None else {**answer, "base": exchange.base})
        write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return f"saved {len(rows)} messages in {path}"

    @property
    def _scope(self) -> Scope:
        if self._given_scope is not None:
            return self._given_scope
        return Scope() if self._control is None else self._control.scope

    def _steer(self, control: ControlFile, scope: Scope | None) -> None:
        control.check_fits(self._engine.info)
        self._engine.set_edits(control.edits, scope or control.scope, control.gate)
        self._control, self._given_scope = control, scope

    def _complete(
        self, message: str, strengths: Sequence[float], show: Callable[[int, str], None]
    ) -> list[Completion]:
        """Return an answer for each strength, of which the last one becomes the turn."""
        exchanges = self._exchanges
        while True:
            turns = [(exchange.message, exchange.answer) for exchange in exchanges]
            prompt = self._framing.prompt(turns, message, self._system)
            requests = [GenerationRequest(prompt, self._seed, strength) for strength in strengths]
            try:
                completions = self._engine.generate(requests, self._sampling, on_text=show)
                break
            except QueryError:
                if not exchanges:
                    raise
                exchanges = exchanges[1:]
        ordered = [completion for _, completion in sorted(completions, key=lambda pair: pair[0])]
        *base, answer = (completion.text.strip() for completion in ordered)
        strength = 0.0 if self.is_closed(ordered[-1]) else strengths[-1]
        exchange = Exchange(message, answer, strength, str(self._scope), *base)
        self._exchanges = [*exchanges, exchange]
        self._seed += 1
        return ordered
