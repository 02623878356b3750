"""The scope of an edit: the tokens that are steered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from alignez_gguf.errors import SteeringError

_FIRST = re.compile(r"first:([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Scope:
    """The time steps at which an edit acts.

    `generation` is the last prompt token and every generated one, since that token decides the first word of
    the answer (the paper's "every generation time step"); the rest of the prompt stays as the model made it.
    `first` is `generation` for the first `length` generated tokens only. `all` is every token.
    """

    kind: Literal["generation", "all", "first"] = "generation"
    length: int | None = None

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """Parse "generation", "all" or "first:N".

        Raises:
            SteeringError: the scope is unknown.
        """
        if isinstance(text, Scope):
            return text
        if text == "generation":
            return cls("generation")
        if text == "all":
            return cls("all")
        if match := _FIRST.fullmatch(text):
            return cls("first", int(match[1]))
        raise SteeringError(f"the scope {text!r} is unknown; use generation, all or first:N")

    def __str__(self) -> str:
        return self.kind if self.length is None else f"{self.kind}:{self.length}"

    def positions(self, n_prompt: int) -> tuple[int, int | None]:
        """Return the first steered position after a prompt of `n_prompt` tokens, and the end or None."""
        if self.kind == "all":
            return 0, None
        first = max(n_prompt - 1, 0)
        return first, None if self.length is None else first + self.length


GENERATION = Scope()
"""Every generated time step."""
