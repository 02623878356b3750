"""The span of the pair differences: leading right singular vectors, without centring.

The subspace method of "Is Free Self-Alignment Possible?" (arXiv 2406.03642) on differences: subtracting the
harmful answer of the same query takes away what the query itself adds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.embeddings import EmbeddingsPerLayer, Weights
from alignez_gguf.directions.linear import fit_linear
from alignez_gguf.directions.singular import top_right_singular_vectors


def fit(
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
    weights: Weights = None,
) -> Directions:
    """Fit the top `rank` right singular vectors of helpful - harmful; see `alignez_gguf.directions.fit`."""
    return fit_linear("svd-diff", _span_of_differences, helpful, harmful, rank, seed, weights)


def _span_of_differences(x: NDArray[np.float32], rank: int, weights: Weights) -> NDArray[np.float32]:
    return top_right_singular_vectors(x[0].astype(np.float64) - x[1], rank, weights)
