"""A conversation with a model whose strength can change between the answers."""

from __future__ import annotations

from collections.abc import Callable

from alignez_gguf.edits import check_strength
from alignez_gguf.engines import Engine, GenerationRequest, Sampling
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.framing import Framing, Turn


class Conversation:
    """Keeps the turns, and answers the next message.

    Args:
        engine: its edit, if it has one, is the control.
        framing: how the turns become a prompt.
        sampling: of the answers.
        seed: of the first answer; each further answer takes the next one.
        strength: of the answers to come; `None` where the engine has no edit.
    """

    def __init__(
        self, engine: Engine, framing: Framing, sampling: Sampling, seed: int, strength: float | None
    ) -> None:
        self._engine = engine
        self._framing = framing
        self._sampling = sampling
        self._seed = seed
        self._strength = strength
        self._turns: list[Turn] = []

    def answer(self, message: str, show: Callable[[str], None]) -> str:
        """Answer a message; `show` gets the text as it grows. An interrupted answer leaves no turn behind.

        When the conversation outgrows the context, its oldest turns are left out.

        Raises:
            QueryError: the message alone is too long.
        """
        turns = self._turns
        while True:
            prompt = self._framing.prompt(turns, message)
            request = GenerationRequest(prompt, self._seed, self._strength or 0.0)
            try:
                completions = self._engine.generate(
                    [request], self._sampling, on_text=lambda _, piece: show(piece)
                )
                break
            except QueryError:
                if not turns:
                    raise
                turns = turns[1:]
        ((_, completion),) = completions
        self._turns = [*turns, (message, completion.text.strip())]
        self._seed += 1
        return completion.text

    def set_strength(self, text: str) -> str:
        """Change the strength from the next answer on. Raises `SteeringError`."""
        if self._strength is None:
            raise SteeringError("no control file was given; start the chat with -c FILE")
        try:
            self._strength = check_strength(float(text))
        except ValueError as error:
            raise SteeringError(f"{text!r} is not a number; write /strength 0.7") from error
        return f"strength {self._strength:g}"

    def reset(self) -> str:
        """Forget all turns."""
        self._turns = []
        return "forgotten"
