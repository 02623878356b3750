"""Directions that separate helpful from harmful embeddings, one method per file.

Methods take and return arrays; they hold no I/O and know nothing of models. Importing this package does
not import torch: a method is imported when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.embeddings import EmbeddingsPerLayer

METHODS = ("ccs", "mean", "svd-diff")
"""The names that `fit` knows; `svd-diff` is in svd_diff.py, and so on."""


@dataclass(frozen=True, eq=False)
class Directions:
    """What a method found in each layer.

    Which class a probe calls 1 is arbitrary for an unsupervised method: the two mean probabilities tell
    (theta_harm has the greater `p_harmful`, theta_help the greater `p_helpful`). The signs of the vectors
    do not depend on it: every vector points from the harmful towards the helpful mean.

    Attributes:
        method: a name of `METHODS`.
        vectors: float32 [n_layer, k, n_embd], orthonormal rows, the most telling one first; rows of zeros
            where the data of a layer has no further direction.
        p_helpful, p_harmful: float32 [n_layer], mean probability of class 1 over the helpful and over the
            harmful embeddings that the vectors were fitted on.
        accuracy: float32 [n_layer], share of embeddings of held-out pairs that fall on their side, by
            cross-validation (the vectors themselves are fitted on all pairs).
        loss: float32 [n_layer], of the probe; `None` for a method without one.
    """

    method: str
    vectors: NDArray[np.float32]
    p_helpful: NDArray[np.float32]
    p_harmful: NDArray[np.float32]
    accuracy: NDArray[np.float32]
    loss: NDArray[np.float32] | None = None


class Method(Protocol):
    """What each file of this package offers."""

    def fit(
        self, helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, *, rank: int, seed: int
    ) -> Directions: ...


def fit(
    method: str,
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
) -> Directions:
    """Find the directions of every layer.

    Args:
        method: a name of `METHODS`.
        helpful, harmful: [n_layer, n_pairs, n_embd]; row i of both belongs to pair i.
        rank: directions per layer; methods other than `svd-diff` have one.
        seed: decides initial values and which pairs are held out.

    Raises:
        ValueError: an unknown method, shapes that differ, a value that is not finite, a rank that the
            method does not have.
        QueryError: too few pairs.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    module = import_module(f"{__name__}.{method.replace('-', '_')}")
    return cast(Method, module).fit(helpful, harmful, rank=rank, seed=seed)
