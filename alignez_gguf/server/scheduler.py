"""The thread that computes: it takes tickets from the queues and gives every lane its turn."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Mapping, Sequence

from alignez_gguf.server.fair_queue import FairQueue
from alignez_gguf.server.jobs import Failed, Ticket
from alignez_gguf.server.lane import Lane

_LOG = logging.getLogger(__name__)


class QueueFullError(Exception):
    """More requests wait than the limit allows."""


class Scheduler:
    """Runs lanes in one thread, which alone touches llama.cpp's contexts.

    Args:
        lanes: by the name of their control; closed with the scheduler.
        limit: the most tickets that wait; those that are being answered do not count.
    """

    def __init__(self, lanes: Mapping[str, Lane], limit: int) -> None:
        self._lanes = dict(lanes)
        self._limit = limit
        self._queues: dict[str, FairQueue[Ticket]] = {name: FairQueue() for name in lanes}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="alignez-scheduler")
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Tickets in the queues."""
        with self._changed:
            return self._count_waiting()

    @property
    def n_growing(self) -> int:
        """Answers that are being written."""
        return sum(lane.n_growing for lane in self._lanes.values())

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, tickets: Sequence[Ticket], lane: str, client: Hashable) -> None:
        """Queue tickets behind those of the same client: all of them, or none.

        Raises:
            QueueFullError: too many wait.
        """
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is shutting down")
            if self._count_waiting() + len(tickets) > self._limit:
                raise QueueFullError(f"more than {self._limit} requests wait; try again in a moment")
            queue = self._queues[lane]
            # Those of clients that left would pile up behind one that waits for its turn.
            if len(queue) > 2 * self._limit:
                queue.keep(lambda ticket: not ticket.cancelled)
            for ticket in tickets:
                queue.put(client, ticket)
            self._changed.notify()

    def close(self) -> None:
        """End all answers, the thread and the lanes. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _count_waiting(self) -> int:
        return sum(not ticket.cancelled for queue in self._queues.values() for ticket in queue)

    def _run(self) -> None:
        while self._wait_for_work():
            for name, lane in self._lanes.items():
                self._turn(name, lane)
        for name, lane in self._lanes.items():
            while ticket := self._next(name, lane.n_parallel):
                ticket.listen(Failed("the server is shutting down"))
            lane.fail("the server is shutting down")
            lane.close()

    def _turn(self, name: str, lane: Lane) -> None:
        try:
            lane.turn(lambda room: self._next(name, room))
        except Exception as error:  # whatever it is, later requests may fare better
            _LOG.exception("the lane of the control %r failed", name)
            lane.fail(f"the model could not go on: {error}")

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to compute; False once the scheduler is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._count_waiting() or self.n_growing)
            return not self._closing

    def _next(self, lane: str, room: int) -> Ticket | None:
        """The ticket whose turn it is, if it needs no more sequences than there is room for."""
        queue = self._queues[lane]
        with self._changed:
            while (ticket := queue.peek()) is not None:
                if not ticket.cancelled and ticket.job.n_sequences > room:
                    return None
                queue.pop()
                if not ticket.cancelled:
                    return ticket
            return None
