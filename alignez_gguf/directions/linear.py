"""Fits a probe per layer and its accuracy by cross-validation, for the methods other than CCS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.embeddings import (
    FOLDS,
    EmbeddingsPerLayer,
    Weights,
    accuracy_of,
    check_shapes,
    check_weights,
    fold_of_pair,
    for_both,
    layer_embeddings,
    towards_helpful,
)
from alignez_gguf.directions.gap import class_gap


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """The probe that a method fitted to the embeddings of one layer.

    Attributes:
        vectors: float32 [k, n_embd], orthonormal rows of any sign; rows of zeros stand for directions that
            the data does not have.
        probability: maps embeddings [2, n, n_embd] to P(helpful) [2, n].
        loss: the minimum that the method found; None for a method that minimises nothing.
    """

    vectors: NDArray[np.float32]
    probability: Callable[[NDArray[np.float32]], NDArray[np.float64]]
    loss: float | None = None


Fitter = Callable[[NDArray[np.float32], Weights], LayerProbe]
"""Fits a probe to embeddings [2, n_pairs, n_embd] (helpful, harmful) and the weights of the pairs."""

Finder = Callable[[NDArray[np.float32], int, Weights], NDArray[np.float32]]
"""Finds the vectors [k, n_embd] of a probe from embeddings, k and the weights of the pairs."""


def fit_probes(
    method: str,
    fit_probe: Fitter,
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    rank: int,
    seed: int,
    weights: Weights,
) -> Directions:
    """Fit a probe in every layer on all pairs, and measure its accuracy by cross-validation.

    Args:
        method: the name of the method in `METHODS`.
        fit_probe: fits one layer.
        helpful, harmful: [n_layer, n_pairs, n_embd].
        rank: number of vectors per layer.
        seed: draws the folds.
        weights: [n_pairs].
    """
    n_layer, n_pairs, n_embd = check_shapes(helpful, harmful, rank)
    weights = check_weights(weights, n_pairs)
    fold = fold_of_pair(n_pairs, seed)
    vectors = np.empty((n_layer, rank, n_embd), np.float32)
    p = np.empty((2, n_layer), np.float32)
    accuracy = np.empty(n_layer, np.float32)
    losses: list[float] = []
    for layer in range(n_layer):
        x = layer_embeddings(helpful, harmful, layer)
        probe = fit_probe(x, weights)
        vectors[layer] = towards_helpful(probe.vectors, class_gap(x[:1], x[1:], weights)[0])
        p[:, layer] = np.average(probe.probability(x), axis=1, weights=weights)
        if probe.loss is not None:
            losses.append(probe.loss)
        held_out = np.empty((2, n_pairs))
        for part in range(FOLDS):
            seen, unseen = fold != part, fold == part
            trained = fit_probe(x[:, seen], None if weights is None else weights[seen])
            held_out[:, unseen] = trained.probability(x[:, unseen])
        accuracy[layer] = accuracy_of(held_out[0], held_out[1], weights)
    return Directions(
        method,
        vectors,
        p_helpful=p[0],
        p_harmful=p[1],
        accuracy=accuracy,
        loss=np.array(losses, np.float32) if losses else None,
    )


def fit_linear(
    method: str,
    find: Finder,
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    rank: int,
    seed: int,
    weights: Weights,
) -> Directions:
    """Fit directions in closed form, by `find`; the first one gives the probabilities."""

    def fit_probe(x: NDArray[np.float32], weights: Weights) -> LayerProbe:
        vectors = towards_helpful(find(x, rank, weights), class_gap(x[:1], x[1:], weights)[0])
        return LayerProbe(vectors, lambda other: _posterior(vectors[0], x, weights, other))

    return fit_probes(method, fit_probe, helpful, harmful, rank, seed, weights)


def _posterior(
    vector: NDArray[np.float32], train: NDArray[np.float32], weights: Weights, x: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return P(helpful | projection) of `x` [2, n, n_embd], for normal classes of equal size and variance.

    With means m +- gap/2 and variance v of the training projections, the odds are exp(gap (t - m) / v).
    """
    projected = (train @ vector).astype(np.float64)
    means = np.average(projected, axis=1, weights=weights)
    gap = means[0] - means[1]
    variance = np.average((projected - means[:, None]) ** 2, axis=1, weights=weights).mean()
    t = (x @ vector).astype(np.float64) - np.average(projected, weights=for_both(weights))
    # a variance of zero separates the classes without doubt; no gap, and nothing is known
    log_odds = np.clip(gap * t / max(variance, np.finfo(np.float64).tiny), -50, 50)
    return np.asarray(1 / (1 + np.exp(-log_odds)))
