"""The answers to one HTTP request, as they come out of the thread that computes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

from alignez_gguf.engines.base import Completion
from alignez_gguf.engines.llama.batching import (
    Event,
    Failed,
    QueuedRequest,
    SequenceRequest,
    TextDelta,
    TokenReport,
)
from alignez_gguf.server.errors import ApiError

_MOST_UNREAD = 8192
"""Events that wait for a client which does not read; beyond them its answers end."""


@dataclass
class Choice:
    """One whole answer."""

    text: str = ""
    tokens: list[TokenReport] = field(default_factory=list)
    end: Completion | None = None

    def add(self, event: TextDelta | Completion) -> None:
        if isinstance(event, Completion):
            self.end = event
        else:
            self.text += event.text
            self.tokens += event.tokens


class Reply:
    """What one HTTP request asks for, and its events. Made and read in one event loop."""

    def __init__(self, requests: Sequence[SequenceRequest]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.queued = [
            QueuedRequest(request, partial(self._hear, index)) for index, request in enumerate(requests)
        ]
        self._n_left = len(requests)
        self.n_tokens = 0
        """Generated so far by answers that are finished."""

    @property
    def is_complete(self) -> bool:
        return self._n_left == 0

    async def events(self) -> AsyncGenerator[tuple[int, TextDelta | Completion], None]:
        """What happens to each choice, until all are finished. Raises a 503 where the server cannot go on."""
        while self._n_left:
            index, event = await self._events.get()
            if isinstance(event, Failed):
                raise ApiError(503, event.message)
            if isinstance(event, Completion):
                self._n_left -= 1
                self.n_tokens += event.n_tokens
            yield index, event

    async def collect(self) -> list[Choice]:
        """All choices as a whole."""
        choices = [Choice() for _ in self.queued]
        async for index, event in self.events():
            choices[index].add(event)
        return choices

    def cancel(self) -> None:
        """Stop what is not finished."""
        for queued in self.queued:
            queued.cancel()

    def _hear(self, index: int, event: Event) -> None:
        # The loop is closed where the server went down before the model did.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._keep, index, event)

    def _keep(self, index: int, event: Event) -> None:
        if self._events.qsize() == _MOST_UNREAD:
            self.cancel()
            event = Failed("the answer is not being read; ask for less at once, or read it faster")
        if self._events.qsize() <= _MOST_UNREAD:
            self._events.put_nowait((index, event))
