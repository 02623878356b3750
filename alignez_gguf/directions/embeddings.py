"""Checks, folds, normalisation and signs of embeddings, which all methods share.

A pair of twice the weight counts like the same pair twice. Only the ratios of weights matter; `None` stands
for equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.errors import QueryError

EmbeddingsPerLayer = NDArray[Any] | Sequence[NDArray[Any]]
"""[n_layer, n_pairs, n_embd] in any float type; a sequence of layers is read layer by layer."""

Weights = NDArray[Any] | None
"""[n_pairs], positive."""

FOLDS = 3
"""Number of folds of pairs in the cross-validation that gives the held-out accuracy."""

MIN_PAIRS = 2 * FOLDS


def check_shapes(helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, rank: int) -> tuple[int, int, int]:
    """Return the shape (n_layer, n_pairs, n_embd) that the two classes share.

    Raises:
        ValueError: the shapes differ, or `rank` is not between 1 and n_embd.
        QueryError: there are too few pairs.
    """
    shapes = {np.shape(layer) for layer in helpful} | {np.shape(layer) for layer in harmful}
    if len(helpful) != len(harmful) or len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"helpful and harmful embeddings must share one shape [n_layer, n_pairs, n_embd], not {shapes}"
        )
    n_pairs, n_embd = shapes.pop()
    if not 1 <= rank <= n_embd:
        raise ValueError(f"the rank is {rank}; it must be between 1 and n_embd = {n_embd}")
    needed = max(MIN_PAIRS, -(-rank * FOLDS // (FOLDS - 1)))
    if n_pairs < needed:
        raise QueryError(
            f"{n_pairs} pairs are too few to fit {rank} directions; give queries for {needed} or more"
        )
    return len(helpful), n_pairs, n_embd


def check_weights(weights: Weights, n_pairs: int) -> Weights:
    """Return the weights of the pairs in float64 with mean 1, or None.

    Raises:
        ValueError: they are not [n_pairs], or one is not positive and finite.
    """
    if weights is None:
        return None
    checked = np.asarray(weights, np.float64)
    if checked.shape != (n_pairs,):
        raise ValueError(f"weights must be [{n_pairs}], one for each pair, not {list(checked.shape)}")
    if not (np.isfinite(checked) & (checked > 0)).all():
        raise ValueError(
            "every weight must be positive and finite; leave out the pairs that are not to count"
        )
    return np.asarray(checked / checked.mean())


def layer_embeddings(
    helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, layer: int
) -> NDArray[np.float32]:
    """Return one layer in float32, [2, n_pairs, n_embd]: helpful, then harmful.

    Raises:
        ValueError: a value is not finite.
    """
    x = np.stack([np.asarray(helpful[layer]), np.asarray(harmful[layer])]).astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"the embeddings of layer {layer} have values that are NaN or infinite")
    return x


def fold_of_pair(n_pairs: int, seed: int) -> NDArray[np.int64]:
    """Draw the fold in which each pair is held out, [n_pairs]; the folds have equal sizes."""
    return np.random.default_rng(seed).permutation(n_pairs) % FOLDS


def towards_helpful(vectors: NDArray[np.float32], class_gap: NDArray[np.float32]) -> NDArray[np.float32]:
    """Flip `vectors` [..., n_embd] that oppose `class_gap` [n_embd]."""
    return np.where((vectors @ class_gap < 0)[..., None], -vectors, vectors)


def accuracy_of(p_helpful: NDArray[Any], p_harmful: NDArray[Any], weights: Weights = None) -> float:
    """Return the share of embeddings on their side of 1/2, where class 1 is helpful; ties count half.

    Args:
        p_helpful, p_harmful: [n_pairs], probabilities of class 1.
        weights: [n_pairs].
    """
    margins = np.stack([p_helpful - 0.5, 0.5 - p_harmful])
    return float(np.average((np.sign(margins) + 1) / 2, weights=for_both(weights)))


def shift_and_scale(x: NDArray[np.float32], weights: Weights = None) -> tuple[NDArray[np.float32], float]:
    """Return the mean [n_embd] of `x` [2, n_pairs, n_embd] over both classes, and the standard deviation.

    The classes share a mean, since the gap between theirs is what a probe looks for; the dimensions share a
    deviation, since different ones would turn the directions. It is 1 where nothing varies.
    """
    shift = np.average(x.mean(axis=0), axis=0, weights=weights).astype(np.float32)
    return shift, deviation(x - shift, weights)


def deviation(centred: NDArray[np.float32], weights: Weights = None) -> float:
    """Return the root mean square of `centred` [2, n_pairs, n_embd], or 1 where all of it is zero."""
    squares = np.square(centred).mean(axis=2)
    return float(np.sqrt(np.average(squares, weights=for_both(weights)))) or 1.0


def for_both(weights: Weights) -> Weights:
    """Return the weights of embeddings [2, n_pairs] from those of pairs [n_pairs]."""
    return None if weights is None else np.stack([weights, weights])
