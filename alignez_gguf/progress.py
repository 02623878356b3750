"""How long work tells of itself. The library is silent; the command line brings a reporter of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]
"""Told how many more steps of a stage are done."""


class Reporter(Protocol):
    """Shows stages with the time left, and notes between them."""

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        """A stage of `total` steps, or of an unknown number."""
        ...

    def note(self, text: str) -> None:
        """A line that stays."""
        ...


class SilentReporter:
    """Says nothing."""

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        pass
