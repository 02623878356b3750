"""A queue in which clients take turns, however many requests each of them has."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First come, first served for one client; round robin between clients. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Item]] = OrderedDict()

    def put(self, client: Hashable, item: Item) -> None:
        self._waiting.setdefault(client, deque()).append(item)

    def peek(self) -> Item | None:
        """What `pop` would take."""
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
