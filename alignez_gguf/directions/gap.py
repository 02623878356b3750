"""The gap between the mean embeddings of the two classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.embeddings import EmbeddingsPerLayer, Weights


def class_gap(
    helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, weights: Weights = None
) -> NDArray[np.float32]:
    """Return the mean helpful minus the mean harmful embedding of every layer.

    The sums are taken in float64, layer by layer, since sums of float16 overflow.

    Args:
        helpful, harmful: [n_layer, n_pairs, n_embd].
        weights: [n_pairs], how much each pair counts.

    Returns:
        float32 [n_layer, n_embd].
    """
    return np.stack(
        [
            (_mean(good, weights) - _mean(bad, weights)).astype(np.float32)
            for good, bad in zip(helpful, harmful, strict=True)
        ]
    )


def _mean(rows: NDArray[Any], weights: Weights) -> NDArray[np.float64]:
    if weights is None:
        return np.asarray(np.mean(rows, axis=0, dtype=np.float64))
    return np.asarray(np.average(np.asarray(rows, np.float64), axis=0, weights=weights))
