"""Shares of answers with their intervals, and differences between systems, query by query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from alignez_gguf.evaluation.metrics import CONFIDENCE_LEVEL, Bootstrap, Estimate
from proving.asking import Said

Count = Callable[[Said], bool]


def refuses(said: Said) -> bool:
    return said.refuses is not None


def is_fluent(said: Said) -> bool:
    return said.fluent


def refuses_fluently(said: Said) -> bool:
    return refuses(said) and said.fluent


@dataclass(frozen=True)
class Share:
    """How many answers of so many there are, and the 95% interval of their share by Wilson's method."""

    count: int
    n: int

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.count, self.n).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
        return float(found.low), float(found.high)


def share(answers: Sequence[Said], count: Count) -> Share:
    """The share of some answers, at least one, that are counted."""
    return Share(sum(map(count, answers)), len(answers))


def rates(answers: Sequence[Said]) -> dict[str, float]:
    """The shares of one system, over all harmful, all harmless and all queries."""
    harmful = [said for said in answers if said.harmful]
    safe = [said for said in answers if not said.harmful]
    found = {
        "refuses_harmful": share(harmful, refuses),
        "refuses_safe": share(safe, refuses),
        "fluent": share(answers, is_fluent),
    }
    return {name: round(one.value, 4) for name, one in found.items()}


def difference(ours: Sequence[Said], base: Sequence[Said], count: Count) -> Estimate:
    """Ours less base in points, over the same queries in the same order, by a paired bootstrap."""

    def values(answers: Sequence[Said]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([count(said) for said in answers], np.float64)

    return Bootstrap(len(ours)).difference(values(ours), values(base), scale=100)
