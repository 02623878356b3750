"""The span of the pair differences: leading right singular vectors, without centring.

The subspace method of "Is Free Self-Alignment Possible?" (arXiv 2406.03642) on differences: subtracting the
harmful answer of the same query takes away what the query itself adds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions import Directions
from alignez_gguf.directions.embeddings import EmbeddingsPerLayer
from alignez_gguf.directions.linear import fit_linear

_NEGLIGIBLE = 1e-5
"""Singular values below this share of the largest are rounding of float16 embeddings."""


def fit(
    helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, *, rank: int = 1, seed: int = 0
) -> Directions:
    """The top `rank` right singular vectors of helpful - harmful; see `alignez_gguf.directions.fit`."""
    return fit_linear("svd-diff", _top_right_singular_vectors, helpful, harmful, rank, seed)


def _top_right_singular_vectors(x: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    """Rows [rank, n_embd], by falling singular value of the differences [n_pairs, n_embd].

    The eigenvectors of the smaller Gram matrix give them: with D = U S V^T, D D^T = U S^2 U^T and
    V^T = S^-1 U^T D. In float64, since squaring halves the digits.
    """
    differences = x[0].astype(np.float64) - x[1]
    n_pairs, n_embd = differences.shape
    wide = n_pairs < n_embd
    squares, vectors = np.linalg.eigh(
        differences @ differences.T if wide else differences.T @ differences
    )  # eigenvalues rise
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0))
    rows = vectors.T[::-1][:rank]
    kept = values > _NEGLIGIBLE * values[0]
    if wide:
        rows = rows @ differences
    top = np.zeros((rank, n_embd), np.float32)
    top[kept] = rows[kept] / (values[kept, None] if wide else 1)
    return top
