"""What a measurement finds: figures with their spread, and the versions of what they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Better = Literal["lower", "higher"]


class BenchError(Exception):
    """A measurement cannot be made; the message says why."""


@dataclass(frozen=True)
class Figure:
    """One number, and how to read it.

    Attributes:
        meaning: what was divided by what, or what was counted.
        value: the median over repetitions; `None` where it could not be measured.
        low, high: quartiles over repetitions; `None` for a single one.
        better: which way is better.
        bound: what must hold on 2 cores with Q4_K_M: at most this where lower is better, else at least.
        unit: behind the number.
        reason: why there is no value.
    """

    meaning: str
    value: float | None
    low: float | None = None
    high: float | None = None
    better: Better = "lower"
    bound: float | None = None
    unit: str = "x"
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """The figures of a measurement by their keys, and the versions of its anchors by their names."""

    figures: Mapping[str, Figure]
    anchors: Mapping[str, str] = field(default_factory=dict)


def ratio(
    meaning: str,
    above: Sequence[float],
    below: Sequence[float],
    *,
    better: Better = "lower",
    bound: float | None = None,
) -> Figure:
    """The median of the ratios of runs that were made side by side."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return _of(meaning, ratios, better, bound, "x")


def quantity(
    meaning: str,
    values: Sequence[float],
    unit: str,
    *,
    better: Better = "lower",
    bound: float | None = None,
) -> Figure:
    """The median of what several runs gave."""
    return _of(meaning, values, better, bound, unit)


def missing(meaning: str, reason: str, *, better: Better = "lower", bound: float | None = None) -> Figure:
    """A figure that this machine lacks something for."""
    return Figure(meaning, None, better=better, bound=bound, reason=reason)


def _of(meaning: str, values: Sequence[float], better: Better, bound: float | None, unit: str) -> Figure:
    low = high = None
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(meaning, statistics.median(values), low, high, better, bound, unit)
