"""Computes figures with intervals from verdicts and measurements, without models, files or a terminal.

Every figure says over how many queries it was taken. Intervals are percentiles of a paired bootstrap: all
figures of an evaluation are computed on the same resampled queries, so systems are compared query by query
(Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["win", "lose", "tie", "disagreement", "unparsed"]
"""The outcome of a comparison for the system that is judged. `disagreement`: the judge changed its mind when
the answers changed places; `unparsed`: it gave no verdict that could be parsed."""

RESAMPLES = 2000
CONFIDENCE_LEVEL = 0.95

_VALUE: dict[Outcome, float] = {"win": 1.0, "lose": -1.0, "tie": 0.0, "disagreement": 0.0, "unparsed": np.nan}


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95% interval and the number of queries behind it.

    Attributes:
        value: None where the figure is undefined.
        low, high: ends of the interval; None where it is undefined.
        n: number of queries behind the figure.
        note: the reason why something is undefined.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    note: str = ""

    @property
    def clear_of_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Tally:
    """The number of comparisons with each outcome."""

    win: int = 0
    lose: int = 0
    tie: int = 0
    disagreement: int = 0
    unparsed: int = 0

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Tally:
        counts = Counter(outcomes)
        return cls(**{str(outcome): count for outcome, count in counts.items()})

    @property
    def judged(self) -> int:
        """Comparisons with a verdict: all but the unparsed."""
        return self.win + self.lose + self.tie + self.disagreement

    @property
    def win_percent(self) -> float | None:
        return self._percent(self.win)

    @property
    def lose_percent(self) -> float | None:
        return self._percent(self.lose)

    @property
    def net_win_percent(self) -> float | None:
        """Win % - Lose % (AlignEZ, section 4.1)."""
        return self._percent(self.win - self.lose)

    def _percent(self, count: int) -> float | None:
        return 100 * count / self.judged if self.judged else None


def outcome_values(outcomes: Sequence[Outcome | None]) -> NDArray[np.float64]:
    """Turn outcomes into numbers [n_queries]: win 1, loss -1, tie or disagreement 0, no verdict NaN."""
    return np.array(
        [np.nan if outcome is None else _VALUE[outcome] for outcome in outcomes], dtype=np.float64
    )


class Bootstrap:
    """Resampled queries, the same for every figure of an evaluation.

    Args:
        n_queries: number of queries of the evaluation, at least 1.
        seed: seed of the draws.
        n_resamples: number of times that all queries are drawn, with replacement.
    """

    def __init__(self, n_queries: int, seed: int = 0, n_resamples: int = RESAMPLES) -> None:
        if n_queries < 1 or n_resamples < 1:
            raise ValueError("at least one query and one resample are needed")
        draws = np.random.default_rng(seed).integers(n_queries, size=(n_resamples, n_queries))
        # How often each query was drawn: [n_resamples, n_queries].
        self._counts = np.stack([np.bincount(row, minlength=n_queries) for row in draws]).astype(np.float64)

    def mean(self, values: NDArray[np.float64], *, scale: float = 1.0) -> Estimate:
        """Return `scale` times the mean of `values` [n_queries], over the queries that are not NaN."""
        n = int(np.isfinite(values).sum())
        if n == 0:
            return Estimate(None, None, None, 0, "no query to take it over")
        value = float(scale * np.nanmean(values))
        if n == 1:
            return Estimate(value, None, None, n, "one query has no interval")
        low, high = _percentiles(scale * self._resampled_means(values))
        return Estimate(value, low, high, n)

    def difference(
        self, values: NDArray[np.float64], reference: NDArray[np.float64], *, scale: float = 1.0
    ) -> Estimate:
        """Return `scale` times the mean difference, over the queries where both values are measured."""
        return self.mean(values - reference, scale=scale)

    def relative_improvement(self, ours: NDArray[np.float64], aligned: NDArray[np.float64]) -> Estimate:
        """Return Net Win(ours) / Net Win(aligned) x 100, from their `outcome_values` against the base model.

        Undefined where Net Win of the aligned model is not positive. Where it is not positive in more than a
        fortieth of the resamples, the ratio has no upper end, and the interval is left out.
        """
        judged = np.isfinite(ours) & np.isfinite(aligned)
        n = int(judged.sum())
        if n == 0:
            return Estimate(None, None, None, 0, "no query with both verdicts")
        ours, aligned = np.where(judged, ours, np.nan), np.where(judged, aligned, np.nan)
        net = float(np.nanmean(aligned))
        if net <= 0:
            return Estimate(
                None, None, None, n, f"Net Win of the aligned model is {100 * net:.1f}%, not positive"
            )
        value = float(100 * np.nanmean(ours) / net)
        numerators, denominators = self._resampled_means(ours), self._resampled_means(aligned)
        defined = denominators > 0
        if defined.mean() < 1 - (1 - CONFIDENCE_LEVEL) / 2:
            return Estimate(
                value, None, None, n, "no interval: Net Win of the aligned model is not clear of zero"
            )
        low, high = _percentiles(100 * numerators[defined] / denominators[defined])
        return Estimate(value, low, high, n)

    def _resampled_means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean of every resample, [n_resamples]; NaN where it holds no measured query."""
        measured = np.isfinite(values)
        totals = self._counts @ np.where(measured, values, 0.0)
        counts = self._counts @ measured.astype(np.float64)
        return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE_LEVEL)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def perplexity(nat_per_token: Estimate) -> Estimate:
    """Return e to the mean negative log-likelihood per token, with its interval."""

    def raised(value: float | None) -> float | None:
        return None if value is None else float(np.exp(value))

    return Estimate(
        raised(nat_per_token.value),
        raised(nat_per_token.low),
        raised(nat_per_token.high),
        nat_per_token.n,
        nat_per_token.note,
    )
