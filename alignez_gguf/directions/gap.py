"""The gap between the mean embeddings of both classes, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def class_gap(helpful: Any, harmful: Any, weights: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
    """Mean helpful minus mean harmful: from [n_layer, n_pairs, n_embd] each to float32 [n_layer, n_embd].

    Summed in float64, layer by layer: float16 sums overflow. `weights` [n_pairs] count the pairs.
    """
    return np.stack(
        [
            (_mean(good, weights) - _mean(bad, weights)).astype(np.float32)
            for good, bad in zip(helpful, harmful, strict=True)
        ]
    )


def _mean(rows: Any, weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    if weights is None:
        return np.asarray(np.mean(rows, axis=0, dtype=np.float64))
    return np.asarray(np.average(np.asarray(rows, np.float64), axis=0, weights=weights))
