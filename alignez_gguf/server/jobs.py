"""What travels between the HTTP side and the thread that computes; types only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from alignez_gguf.engines import Sampling
from alignez_gguf.scope import GENERATION, Scope


@dataclass(frozen=True)
class Job:
    """One text to be written: it depends on these fields alone, never on its neighbours.

    Attributes:
        tokens: the prompt.
        seed: of the draws.
        control: the name of the control that steers it.
        strength: of that control.
        scope: which tokens are steered.
        n_alternatives: report the log-probability of every token, and of so many of the likeliest; or not.
        divergence: report how far steering moved the distribution of every token. Takes a second sequence.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    control: str = ""
    strength: float = 0.0
    scope: Scope = GENERATION
    n_alternatives: int | None = None
    divergence: bool = False

    @property
    def n_sequences(self) -> int:
        return 2 if self.divergence else 1


@dataclass(frozen=True)
class TokenReport:
    """A generated token.

    Attributes:
        data: its bytes, which need not be whole characters.
        logprob: its log-probability in nat, before temperature and top-p; `None` where none is wanted.
        alternatives: the likeliest tokens with theirs, best first.
        offset: where it begins in the text, in characters.
        divergence: KL(P_base || P_steered) of the distribution it was drawn from, in nat; `None` where none
            is wanted.
    """

    data: bytes
    logprob: float | None = None
    alternatives: tuple[tuple[bytes, float], ...] = ()
    offset: int = 0
    divergence: float | None = None


@dataclass(frozen=True)
class Piece:
    """Text that is certain to be part of the answer, and its tokens where they are reported."""

    text: str
    tokens: tuple[TokenReport, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer; `n_tokens` as in `engines.Completion`, and what a gate has decided of it."""

    reason: Literal["stop", "length"]
    n_tokens: int
    steered: bool | None = None


@dataclass(frozen=True)
class Failed:
    """The answer ends here, because the server could not go on."""

    message: str


Event = Piece | Finished | Failed
Listener = Callable[[Event], None]
"""Called from the thread that computes; must return at once and not raise."""


class Ticket:
    """A job that was handed in. Cancelling it frees its place as soon as the present batch is computed."""

    def __init__(self, job: Job, listen: Listener) -> None:
        self.job = job
        self.listen = listen
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
