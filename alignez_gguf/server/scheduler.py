"""The thread that computes: it takes tickets from the queue and gives the lane its turns."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Sequence

from alignez_gguf.server.fair_queue import FairQueue
from alignez_gguf.server.jobs import Failed, Ticket
from alignez_gguf.server.lane import Lane

_LOG = logging.getLogger(__name__)


class QueueFullError(Exception):
    """More requests wait than the limit allows."""


class Scheduler:
    """Runs a lane in a thread, which alone touches its context of llama.cpp.

    Args:
        lane: closed with the scheduler.
        limit: the most tickets that wait; those that are being answered do not count.
    """

    def __init__(self, lane: Lane, limit: int) -> None:
        self._lane = lane
        self._limit = limit
        self._queue: FairQueue[Ticket] = FairQueue()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="alignez-scheduler")
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Tickets in the queue."""
        with self._changed:
            return self._count_waiting()

    @property
    def n_growing(self) -> int:
        """Answers that are being written."""
        return self._lane.n_growing

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, tickets: Sequence[Ticket], client: Hashable) -> None:
        """Queue tickets behind those of the same client: all of them, or none.

        Raises:
            QueueFullError: too many wait.
        """
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is shutting down")
            if self._count_waiting() + len(tickets) > self._limit:
                raise QueueFullError(f"more than {self._limit} requests wait; try again in a moment")
            # Those of clients that left would pile up behind one that waits for its turn.
            if len(self._queue) > 2 * self._limit:
                self._queue.keep(lambda ticket: not ticket.cancelled)
            for ticket in tickets:
                self._queue.put(client, ticket)
            self._changed.notify()

    def close(self) -> None:
        """End all answers, the thread and the lane. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _count_waiting(self) -> int:
        return sum(not ticket.cancelled for ticket in self._queue)

    def _run(self) -> None:
        while self._wait_for_work():
            self._turn()
        while ticket := self._next(self._lane.n_parallel):
            ticket.listen(Failed("the server is shutting down"))
        self._lane.fail("the server is shutting down")
        self._lane.close()

    def _turn(self) -> None:
        try:
            self._lane.turn(self._next)
        except Exception as error:  # whatever it is, later requests may fare better
            _LOG.exception("the answers that were being written failed")
            self._lane.fail(f"the model could not go on: {error}")

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to compute; False once the scheduler is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._count_waiting() or self.n_growing)
            return not self._closing

    def _next(self, room: int) -> Ticket | None:
        """The ticket whose turn it is, if it needs no more sequences than there is room for."""
        with self._changed:
            while (ticket := self._queue.peek()) is not None:
                if not ticket.cancelled and ticket.job.n_sequences > room:
                    return None
                self._queue.pop()
                if not ticket.cancelled:
                    return ticket
            return None
