"""Which gains are more than chance, where many edits were tried on the same queries.

Of hundreds of edits that do nothing, the best one gains by chance. How much, the gains themselves tell: an
edit without effect is as likely to lose on a query what it gains there, so that each query is given a random
sign, the same for all edits, and the greatest t among them is noted,

    t = mean(gains) / (s(gains) / sqrt(n_queries)).

What exceeds the 95% quantile of those is beyond chance: the single-step max-T procedure of Westfall and Young
(Resampling-Based Multiple Testing, 1993). Edits that move the queries alike, as neighbours do, count little
more than one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LEVEL = 0.05
"""The probability that any edit without effect passes."""

_DRAWS = 1000


def beyond_chance(gains: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which edits gain by more than the best of as many would by chance, bool [n_edits]. Deterministic.

    Args:
        gains: [n_edits, n_queries], in nat.
    """
    n_edits, n_queries = gains.shape
    if n_queries < 2:
        return np.zeros(n_edits, dtype=bool)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(n_queries, _DRAWS))
    greatest = _t(gains, signs).max(axis=0)
    limit = np.quantile(greatest, 1 - _LEVEL, method="higher")
    return np.asarray(_t(gains, np.ones((n_queries, 1)))[:, 0] > limit)


def _t(gains: NDArray[np.float64], signs: NDArray[np.float64]) -> NDArray[np.float64]:
    """t of every edit under every draw of signs, [n_edits, n_draws]; 0 where nothing moves.

    Args:
        gains: [n_edits, n_queries].
        signs: [n_queries, n_draws].
    """
    n_queries = len(signs)
    mean = gains @ signs / n_queries
    square = (gains**2).mean(axis=1, keepdims=True)
    # From the mean of squares, since that is the same under all signs; rounding leaves a little of nothing.
    variance = np.maximum(square - mean**2, np.finfo(np.float64).eps * square) * n_queries / (n_queries - 1)
    return np.asarray(
        np.divide(mean, np.sqrt(variance / n_queries), out=np.zeros_like(mean), where=variance > 0)
    )
