"""Turns the bytes of generated tokens into text that ends before a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class StopStringFilter:
    """Decodes tokens one by one, and withholds what may be the beginning of a stop string.

    Characters that are split over tokens appear when they are complete.

    Attributes:
        stopped: whether a stop string has been met.
        n_given: the number of characters it has given.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._given: list[str] = []
        self.stopped = False
        self.n_given = 0

    def feed(self, piece: bytes | str) -> str:
        """Add the bytes of a token, or characters; return those that are certain to be part of the text."""
        self._held += self._decoder.decode(piece) if isinstance(piece, bytes) else piece
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            return self._give(min(starts))
        return self._give(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """End the text, and return the characters that were held back. An incomplete character is dropped."""
        return "" if self.stopped else self._give(len(self._held))

    @property
    def text(self) -> str:
        """All characters given so far."""
        return "".join(self._given)

    @property
    def n_decoded(self) -> int:
        """The number of characters of all tokens, with those that are withheld."""
        return self.n_given + len(self._held)

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        if given:
            self._given.append(given)
            self.n_given += length
        return given

    def _possible_stop(self) -> int:
        """The length of the longest end of the held characters that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if self._begins_a_stop(self._held[-n:])), 0)

    def _begins_a_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
