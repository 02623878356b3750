"""A completion that is being written, whatever computes its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from alignez_gguf.engines import Completion, Sampling
from alignez_gguf.engines.text import StoppedText


class GrowingCompletion:
    """Grows token by token, until the model ends it, a stop string does, or it is as long as it may be.

    Args:
        index: of the request.
        sampling: says where it ends.
        on_text: told of new characters, with the index.

    Attributes:
        last: the token to be computed next; -1 before the first one.
        completion: what it came to; `None` while it grows.
        steered: whether an edit acts on it.
    """

    def __init__(self, index: int, sampling: Sampling, on_text: Callable[[int, str], None] | None) -> None:
        self.index = index
        self.last = -1
        self.completion: Completion | None = None
        self.steered = False
        self._n_tokens = 0
        self._max_tokens = sampling.max_tokens
        self._text = StoppedText(sampling.stop)
        self._on_text = on_text

    def add(self, token: int, piece: bytes | str) -> None:
        """Go on with a token and what it adds to the text."""
        self.last = token
        self._n_tokens += 1
        self._show(self._text.feed(piece))
        if self._text.stopped:
            self._finish("stop")
        elif self._n_tokens == self._max_tokens:
            self._finish("length")

    def end(self) -> None:
        """The model has ended the text."""
        self._finish("stop")

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._show(self._text.finish())
        self.completion = Completion(self._text.text, self._n_tokens, reason, self.steered)

    def _show(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(self.index, piece)
