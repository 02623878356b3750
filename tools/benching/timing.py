"""Timing: runs that are to be compared alternate, so that a machine that grows slower slows both."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternated(
    first: Callable[[], float], second: Callable[[], float], pairs: int
) -> tuple[list[float], list[float]]:
    """The results of both, called `pairs` times each in the order ABBAABBA..."""
    found: tuple[list[float], list[float]] = [], []
    for pair in range(pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        for which in order:
            found[which].append((first, second)[which]())
    return found
