"""The thread that computes: it takes requests from the queue and steps the batch."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from alignez_gguf.engines.llama.batching import Batch, Failed, QueuedRequest

_LOG = logging.getLogger(__name__)

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A queue in which clients take turns, however many requests each of them has.

    First come, first served for one client; round robin between clients. Not thread-safe.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Item]] = OrderedDict()

    def put(self, client: Hashable, item: Item) -> None:
        self._waiting.setdefault(client, deque()).append(item)

    def peek(self) -> Item | None:
        """Return the item that `pop` would take, or None."""
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def pop(self) -> Item:
        """Take the first item of the client whose turn it is. Raises `KeyError` where there is none."""
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[client] = items
        return item

    def keep(self, wanted: Callable[[Item], bool]) -> None:
        """Drop every item that is not wanted any more."""
        kept = ((client, deque(filter(wanted, items))) for client, items in self._waiting.items())
        self._waiting = OrderedDict((client, items) for client, items in kept if items)

    def __iter__(self) -> Iterator[Item]:
        return (item for items in self._waiting.values() for item in items)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))


class QueueFullError(Exception):
    """More requests wait than the limit allows."""


class Scheduler:
    """Runs a batch in a thread, which alone touches its context of llama.cpp.

    Args:
        batch: closed with the scheduler.
        limit: the most requests that wait; running ones do not count.
    """

    def __init__(self, batch: Batch, limit: int) -> None:
        self._batch = batch
        self._limit = limit
        self._queue: FairQueue[QueuedRequest] = FairQueue()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="alignez-scheduler")
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """The number of requests in the queue."""
        with self._changed:
            return self._count_waiting()

    @property
    def n_running(self) -> int:
        """The number of requests that are being completed."""
        return self._batch.n_running

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, queued: Sequence[QueuedRequest], client: Hashable) -> None:
        """Queue requests behind those of the same client: all of them, or none.

        Raises:
            QueueFullError: too many wait.
        """
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is shutting down")
            if self._count_waiting() + len(queued) > self._limit:
                raise QueueFullError(f"more than {self._limit} requests wait; try again in a moment")
            # Those of clients that left would pile up behind one that waits for its turn.
            if len(self._queue) > 2 * self._limit:
                self._queue.keep(lambda queued: not queued.cancelled)
            for request in queued:
                self._queue.put(client, request)
            self._changed.notify()

    def close(self) -> None:
        """End all answers, the thread and the batch. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _count_waiting(self) -> int:
        return sum(not queued.cancelled for queued in self._queue)

    def _run(self) -> None:
        while self._wait_for_work():
            self._step()
        while queued := self._next(self._batch.n_parallel):
            queued.listen(Failed("the server is shutting down"))
        self._batch.fail("the server is shutting down")
        self._batch.close()

    def _step(self) -> None:
        try:
            self._batch.step(self._next)
        except Exception as error:  # whatever it is, later requests may fare better
            _LOG.exception("the answers that were being written failed")
            self._batch.fail(f"the model could not go on: {error}")

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to compute. Return False once the scheduler is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._count_waiting() or self.n_running)
            return not self._closing

    def _next(self, room: int) -> QueuedRequest | None:
        """Return the request whose turn it is, if it needs at most `room` sequences."""
        with self._changed:
            while (queued := self._queue.peek()) is not None:
                if not queued.cancelled and queued.request.n_sequences > room:
                    return None
                self._queue.pop()
                if not queued.cancelled:
                    return queued
            return None
