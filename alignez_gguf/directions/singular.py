"""Computes right singular vectors of embeddings, for the methods that fit a subspace."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.embeddings import Weights

_NEGLIGIBLE = 1e-5
"""Singular values below this share of the largest are rounding of float16 embeddings."""


def top_right_singular_vectors(rows: NDArray[Any], rank: int, weights: Weights = None) -> NDArray[np.float32]:
    """Return the leading right singular vectors [rank, n_embd] of `rows` [n, n_embd], largest value first.

    A row of weight w is scaled by sqrt(w), which is to stack it w times. Where the matrix has no further
    direction, rows of zeros.

    The eigenvectors of the smaller Gram matrix give them: with D = U S V^T, D D^T = U S^2 U^T and
    V^T = S^-1 U^T D. In float64, since squaring halves the digits.
    """
    stacked = np.asarray(rows, np.float64)
    if weights is not None:
        stacked = stacked * np.sqrt(weights)[:, None]
    n, n_embd = stacked.shape
    wide = n < n_embd
    squares, vectors = np.linalg.eigh(stacked @ stacked.T if wide else stacked.T @ stacked)
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0))  # eigenvalues rise
    leading = vectors.T[::-1][:rank]
    kept = values > _NEGLIGIBLE * values[0]
    if wide:
        leading = leading @ stacked
    top = np.zeros((rank, n_embd), np.float32)
    top[kept] = leading[kept] / (values[kept, None] if wide else 1)
    return top
