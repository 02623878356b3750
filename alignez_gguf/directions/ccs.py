"""Contrast-consistent search, as AlignEZ uses it: a linear probe per layer, trained without labels.

A probe P(x) = sigmoid(theta . x + b) minimises, over the pairs of a layer,

    E[(P(helpful) - (1 - P(harmful)))^2 + min(P(helpful), P(harmful))]

so that it gives the two answers of a pair opposite classes, and does so with confidence; which of them is
class 1 is left to chance. Burns et al. (arXiv 2212.03827) square the minimum; AlignEZ does not.

Burns et al. also centre each class by its own mean. There the classes are "yes" and "no"; here they are
helpful and harmful, and centring them apart would remove the very direction that is looked for. So the
embeddings of a layer are shifted by one mean and scaled by one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.embeddings import (
    FOLDS,
    EmbeddingsPerLayer,
    Weights,
    accuracy_of,
    check_shapes,
    check_weights,
    deviation,
    fold_of_pair,
    layer_embeddings,
    shift_and_scale,
    towards_helpful,
)
from alignez_gguf.directions.gap import class_gap
from alignez_gguf.directions.probe_training import train
from alignez_gguf.errors import AlignezError

RESTARTS = 10
FOLD_RESTARTS = 2
"""Restarts of each fold: 10 + 3 x 2 probes fill the 16 columns that a matrix product computes anyway."""

CcsCentring = Literal["pooled", "none", "per-class"]

_INITIAL_LOGIT = 0.01
"""Standard deviation of the logits of a fresh probe, so that no restart is born with an opinion."""

_CHUNK_BYTES = 1 << 20
"""Bytes of layers that are trained together: small ones share the cost of a step, large ones the cache."""


@dataclass(frozen=True)
class _Options:
    """The options of a fit, the same for every layer."""

    fold: NDArray[np.int64]
    weights: Weights
    seed: int
    squared_min: bool
    centring: CcsCentring


@dataclass(frozen=True)
class _Layer:
    """The result of the fit of one layer."""

    vector: NDArray[np.float32]
    p_helpful: float
    p_harmful: float
    accuracy: float
    loss: float
    spread: float
    flipped: float


def fit(
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
    weights: Weights = None,
    squared_min: bool = False,
    centring: CcsCentring = "pooled",
) -> Directions:
    """Fit the probe of lowest loss among 10 restarts in every layer; see `alignez_gguf.directions.fit`.

    Chunks of layers run in parallel threads, each with one torch thread, so that the result does not
    depend on how many there are; torch's number of threads is set to 1 for the time of the fit.

    Args:
        squared_min: square the minimum in the loss, as Burns et al. do.
        centring: `pooled` subtracts the mean of both classes, `none` nothing; `per-class`, which is what
            Burns et al. do, is refused.

    Raises:
        AlignezError: centring per class.
        ValueError: another centring, a rank other than 1, and what `alignez_gguf.directions.fit` raises.
    """
    if rank != 1:
        raise ValueError(f"a CCS probe is one direction, not {rank}")
    _check_centring(centring)
    n_layer, n_pairs, n_embd = check_shapes(helpful, harmful, rank)
    weights = check_weights(weights, n_pairs)
    options = _Options(fold_of_pair(n_pairs, seed), weights, seed, squared_min, centring)
    size = max(1, _CHUNK_BYTES // (2 * n_pairs * n_embd * 4))
    chunks = [range(start, min(start + size, n_layer)) for start in range(0, n_layer, size)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            fits = pool.map(lambda chunk: _fit_chunk(helpful, harmful, chunk, options), chunks)
            layers = [layer for chunk in fits for layer in chunk]
    finally:
        torch.set_num_threads(threads)
    return Directions(
        "ccs",
        vectors=np.stack([layer.vector for layer in layers])[:, None],
        p_helpful=np.array([layer.p_helpful for layer in layers], np.float32),
        p_harmful=np.array([layer.p_harmful for layer in layers], np.float32),
        accuracy=np.array([layer.accuracy for layer in layers], np.float32),
        loss=np.array([layer.loss for layer in layers], np.float32),
        spread=np.array([layer.spread for layer in layers], np.float32),
        flipped=np.array([layer.flipped for layer in layers], np.float32),
    )


def _check_centring(centring: str) -> None:
    if centring == "per-class":
        raise AlignezError(
            "centring per class subtracts from helpful and harmful embeddings what tells them apart, and the "
            "probe finds something else at a low loss; choose centring 'pooled'"
        )
    if centring not in get_args(CcsCentring):
        raise ValueError(f"ccs has no centring {centring!r}; choose 'pooled' or 'none'")


def _fit_chunk(
    helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, layers: Sequence[int], options: _Options
) -> list[_Layer]:
    x = np.stack([_normalised(layer_embeddings(helpful, harmful, layer), options) for layer in layers])
    fold_of_probe = np.array([-1] * RESTARTS + sorted([*range(FOLDS)] * FOLD_RESTARTS))
    initial = np.stack(
        [
            np.random.default_rng([options.seed, layer]).standard_normal((len(fold_of_probe), x.shape[-1]))
            for layer in layers
        ]
    )
    initial *= _INITIAL_LOGIT / np.sqrt(x.shape[-1])
    share = (fold_of_probe[:, None] != options.fold) * (1.0 if options.weights is None else options.weights)
    share /= share.sum(axis=1, keepdims=True)
    theta, p, loss = train(
        torch.from_numpy(x),
        torch.from_numpy(initial.astype(np.float32)),
        torch.from_numpy(share.astype(np.float32)),
        squared_min=options.squared_min,
    )
    gaps = class_gap(x[:, 0], x[:, 1], options.weights)
    return [_best(theta[i], p[i], loss[i], gaps[i], fold_of_probe, options) for i in range(len(layers))]


def _normalised(x: NDArray[np.float32], options: _Options) -> NDArray[np.float32]:
    """Centre a layer `x` [2, n_pairs, n_embd] by the options and scale it by one number, in place."""
    if options.centring == "none":
        x /= deviation(x, options.weights)
    else:
        shift, scale = shift_and_scale(x, options.weights)
        x -= shift
        x /= scale
    return x


def _best(
    theta: NDArray[np.float32],
    p: NDArray[np.float32],
    loss: NDArray[np.float32],
    gap: NDArray[np.float32],
    fold_of_probe: NDArray[np.int64],
    options: _Options,
) -> _Layer:
    """Keep the probe of lowest loss, and measure the best one of each fold on the pairs it did not see."""
    fold, weights = options.fold, options.weights
    held_out = np.empty((2, len(fold)), np.float32)
    for part in range(FOLDS):
        probes = np.flatnonzero(fold_of_probe == part)
        p_part = p[probes[loss[probes].argmin()]]
        seen, unseen = fold != part, fold == part
        means = np.average(p_part[:, seen], axis=1, weights=None if weights is None else weights[seen])
        held_out[:, unseen] = 1 - p_part[:, unseen] if means[0] < means[1] else p_part[:, unseen]
    best = int(loss[:RESTARTS].argmin())
    p_helpful, p_harmful = np.average(p[best], axis=1, weights=weights)
    directions = theta[:RESTARTS] / np.linalg.norm(theta[:RESTARTS], axis=1, keepdims=True)
    rejected = np.delete(directions, best, axis=0)
    helpful_is_1, harmful_is_1 = np.average(p[:RESTARTS], axis=2, weights=weights).T
    calls_harmful_1 = harmful_is_1 > helpful_is_1
    return _Layer(
        vector=towards_helpful(directions[best], gap),
        p_helpful=float(p_helpful),
        p_harmful=float(p_harmful),
        accuracy=accuracy_of(held_out[0], held_out[1], weights),
        loss=float(loss[best]),
        spread=float(1 - np.abs(rejected @ directions[best]).mean()),
        flipped=float((calls_harmful_1 != calls_harmful_1[best]).mean()),
    )
