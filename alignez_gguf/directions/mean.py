"""The difference of the class means."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions import Directions
from alignez_gguf.directions.embeddings import EmbeddingsPerLayer
from alignez_gguf.directions.linear import fit_linear


def fit(
    helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, *, rank: int = 1, seed: int = 0
) -> Directions:
    """The unit vector along mean(helpful) - mean(harmful); see `alignez_gguf.directions.fit`."""
    if rank != 1:
        raise ValueError(f"the difference of means is one direction, not {rank}")
    return fit_linear("mean", _mean_difference, helpful, harmful, rank, seed)


def _mean_difference(x: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    helpful, harmful = x.mean(axis=1, dtype=np.float64)
    gap = helpful - harmful
    length = np.linalg.norm(gap)
    return np.asarray(gap / length if length else gap, np.float32).reshape(rank, -1)
