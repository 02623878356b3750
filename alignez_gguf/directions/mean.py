"""The method `mean`: the difference of the class means."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.embeddings import EmbeddingsPerLayer, Weights
from alignez_gguf.directions.linear import fit_linear


def fit(
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
    weights: Weights = None,
) -> Directions:
    """Fit the unit vector along mean(helpful) - mean(harmful); see `alignez_gguf.directions.fit`."""
    if rank != 1:
        raise ValueError(f"the difference of means is one direction, not {rank}")
    return fit_linear("mean", _mean_difference, helpful, harmful, rank, seed, weights)


def _mean_difference(x: NDArray[np.float32], rank: int, weights: Weights) -> NDArray[np.float32]:
    helpful, harmful = np.average(x.astype(np.float64), axis=1, weights=weights)
    gap = helpful - harmful
    length = np.linalg.norm(gap)
    return np.asarray(gap / length if length else gap, np.float32).reshape(rank, -1)
