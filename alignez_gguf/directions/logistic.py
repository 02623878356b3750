"""Logistic regression on which answer is the helpful one: the supervised baseline.

Where it cannot tell the classes apart on held-out pairs, an unsupervised probe will hardly do so; the paper
takes its accuracy as the forecast of self-alignment (section 4.2). Embeddings are normalised as for CCS; with
the weights w_i of the pairs scaled to mean 1, and y = 1 for helpful,

    |theta|^2 / 2 + sum_i w_i (-log P(y_i | x_i))

is minimised, which is scikit-learn's default penalty (C = 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.embeddings import EmbeddingsPerLayer, Weights, shift_and_scale
from alignez_gguf.directions.linear import LayerProbe, fit_probes

_TOLERANCE = 1e-6
"""Limit of the largest slope; scikit-learn's 1e-4 leaves the direction at cosine .998 to the minimum."""

_MOST_ITERATIONS = 1000


def fit(
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
    weights: Weights = None,
) -> Directions:
    """Fit the unit normal of the separating plane in every layer; see `alignez_gguf.directions.fit`.

    `loss` is the mean cross-entropy of the fitted embeddings, in nats, without the penalty.
    """
    if rank != 1:
        raise ValueError(f"a logistic probe is one direction, not {rank}")
    return fit_probes("logistic", _fit_probe, helpful, harmful, rank, seed, weights)


def _fit_probe(x: NDArray[np.float32], weights: Weights) -> LayerProbe:
    _, n_pairs, n_embd = x.shape
    shift, scale = shift_and_scale(x, weights)
    counts = np.ones(n_pairs) if weights is None else weights / weights.mean()
    model = LogisticRegression(tol=_TOLERANCE, max_iter=_MOST_ITERATIONS)
    rows = ((x - shift) / scale).reshape(-1, n_embd)
    model.fit(rows, np.repeat([1, 0], n_pairs), sample_weight=np.tile(counts, 2))

    def log_odds(other: NDArray[np.float32]) -> NDArray[np.float64]:
        normalised = ((other - shift) / scale).reshape(-1, n_embd)
        return np.asarray(model.decision_function(normalised), np.float64).reshape(2, -1)

    # -log P of the right class is log(1 + exp(-log odds of it))
    surprise = np.logaddexp(0, log_odds(x) * [[-1], [1]])
    length = np.linalg.norm(model.coef_)
    return LayerProbe(
        vectors=np.asarray(model.coef_ / length if length else model.coef_, np.float32),
        probability=lambda other: np.exp(-np.logaddexp(0, -log_odds(other))),
        loss=float(np.average(surprise.mean(axis=0), weights=weights)),
    )
