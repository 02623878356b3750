"""A completion that is being generated, whatever computes its tokens."""

from __future__ import annotations

from typing import Literal

from alignez_gguf.engines.base import Completion, Sampling
from alignez_gguf.engines.text import StopStringFilter


class StreamingCompletion:
    """Collects tokens until the model ends the text, a stop string does, or there are `max_tokens`.

    Attributes:
        last: the token to be computed next; -1 before the first one.
        text: the text generated so far, and how much of it can be shown.
        completion: the result; `None` until it is finished.
        steered: whether an edit acts on it.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.last = -1
        self.text = StopStringFilter(sampling.stop)
        self.completion: Completion | None = None
        self.steered = False
        self._n_tokens = 0
        self._max_tokens = sampling.max_tokens

    def add(self, token: int, piece: bytes | str) -> str:
        """Add a token, and return the characters that can now be shown."""
        self.last = token
        self._n_tokens += 1
        shown = self.text.feed(piece)
        if self.text.stopped:
            return shown + self._finish("stop")
        if self._n_tokens == self._max_tokens:
            return shown + self._finish("length")
        return shown

    def end(self) -> str:
        """End the text as the model has done, and return the characters that were held back."""
        return self._finish("stop")

    def _finish(self, reason: Literal["stop", "length"]) -> str:
        shown = self.text.finish()
        self.completion = Completion(self.text.text, self._n_tokens, reason, self.steered)
        return shown
