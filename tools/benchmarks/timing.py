"""Timing: runs that are to be compared alternate, so that a machine that grows slower slows both."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(
    first: Callable[[int], object], second: Callable[[int], object], steps: int
) -> tuple[float, float]:
    """Seconds of both over the steps 0, 1, 2, ..., which they do in turns: A0 B0 B1 A1 A2 B2 ..."""
    taken = [0.0, 0.0]
    for step in range(steps):
        for which in (0, 1) if step % 2 == 0 else (1, 0):
            began = time.perf_counter()
            (first, second)[which](step)
            taken[which] += time.perf_counter() - began
    return taken[0], taken[1]


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
