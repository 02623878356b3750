from __future__ import annotations

import pytest

from alignez_gguf.server.scheduler import FairQueue


def test_clients_take_turns_and_each_is_served_in_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "b2", "c1"):
        queue.put(item[0], item)
    assert len(queue) == 6
    assert sorted(queue) == ["a1", "a2", "a3", "b1", "b2", "c1"]
    taken = []
    while len(queue):
        assert queue.peek() not in taken
        taken.append(queue.pop())
    assert taken == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_newcomer_waits_for_one_request_of_the_others_at_most() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3"):
        queue.put("a", item)
    queue.pop()
    queue.put("b", "b1")
    assert [queue.pop(), queue.pop()] == ["a2", "b1"]


def test_empty_queue_has_nothing_to_show_or_to_give() -> None:
    queue: FairQueue[str] = FairQueue()
    assert queue.peek() is None
    with pytest.raises(KeyError):
        queue.pop()


def test_items_that_are_not_wanted_any_more_are_dropped_and_the_turns_stay() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1", "c1", "c2"):
        queue.put(item[0], item)
    queue.keep(lambda item: item not in ("a1", "b1"))
    assert [queue.pop() for _ in range(len(queue))] == ["a2", "c1", "c2"]
