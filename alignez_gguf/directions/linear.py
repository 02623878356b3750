"""What `mean` and `svd-diff` share: directions in closed form, and probabilities from the first one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions import Directions
from alignez_gguf.directions.embeddings import (
    FOLDS,
    EmbeddingsPerLayer,
    accuracy_of,
    check_shapes,
    fold_of_pair,
    layer_embeddings,
    towards_helpful,
)

Finder = Callable[[NDArray[np.float32], int], NDArray[np.float32]]
"""From embeddings [2, n_pairs, n_embd] (helpful, harmful) and k to k orthonormal rows [k, n_embd].

Rows of zeros stand for directions that the data does not have."""


def fit_linear(
    method: str,
    find: Finder,
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    rank: int,
    seed: int,
) -> Directions:
    """`find` in every layer, on all pairs; its accuracy on held-out pairs by cross-validation."""
    n_layer, n_pairs, n_embd = check_shapes(helpful, harmful, rank)
    fold = fold_of_pair(n_pairs, seed)
    vectors = np.empty((n_layer, rank, n_embd), np.float32)
    p = np.empty((2, n_layer), np.float32)
    accuracy = np.empty(n_layer, np.float32)
    for layer in range(n_layer):
        x = layer_embeddings(helpful, harmful, layer)
        vectors[layer] = _oriented(find(x, rank), x)
        p[:, layer] = _posterior(vectors[layer, 0], x, x).mean(axis=1)
        held_out = np.empty((2, n_pairs))
        for part in range(FOLDS):
            train = x[:, fold != part]
            first = _oriented(find(train, rank), train)[0]
            held_out[:, fold == part] = _posterior(first, train, x[:, fold == part])
        accuracy[layer] = accuracy_of(*held_out)
    return Directions(method, vectors, p_helpful=p[0], p_harmful=p[1], accuracy=accuracy)


def _oriented(vectors: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
    return towards_helpful(vectors, x[0].mean(axis=0) - x[1].mean(axis=0))


def _posterior(
    vector: NDArray[np.float32], train: NDArray[np.float32], x: NDArray[np.float32]
) -> NDArray[np.float64]:
    """P(helpful | projection) of `x` [2, n, n_embd], for two normal classes of equal size and variance.

    With means m +- gap/2 and variance v of the training projections, the odds are exp(gap (t - m) / v).
    """
    projected = (train @ vector).astype(np.float64)
    gap = projected[0].mean() - projected[1].mean()
    variance = projected.var(axis=1).mean()
    t = (x @ vector).astype(np.float64) - projected.mean()
    # a variance of zero separates the classes without doubt; no gap, and nothing is known
    log_odds = np.clip(gap * t / max(variance, np.finfo(np.float64).tiny), -50, 50)
    return np.asarray(1 / (1 + np.exp(-log_odds)))
