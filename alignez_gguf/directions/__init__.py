"""Directions that separate helpful from harmful embeddings, one method per file.

Methods take and return arrays; they hold no I/O and know nothing of models. Importing this package does
not import torch: a method is imported when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.embeddings import EmbeddingsPerLayer, Weights

METHODS = ("ccs", "svd", "svd-diff", "mean", "logistic")
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
            where the data of a layer has no further direction. What they span depends on the method: the
            first line of its `fit` says it.
        p_helpful, p_harmful: float32 [n_layer], mean probability of class 1 over the helpful and over the
            harmful embeddings that the vectors were fitted on.
        accuracy: float32 [n_layer], share of embeddings of held-out pairs that fall on their side, by
            cross-validation (the vectors themselves are fitted on all pairs).
        loss: float32 [n_layer], of the probe; `None` for a method without one.
        spread: float32 [n_layer], how far the restarts of a probe lie from the kept one: 1 less their mean
            |cosine| to it, 0 where all found the same direction and towards 1 where each found its own;
            `None` for a method without restarts.
        flipped: float32 [n_layer], share of the restarts of a probe whose class 1 is the other one than that
            of the kept probe: near a half, which class it calls 1 is left to chance; `None` likewise.

    With weights, the means and shares are weighted ones.
    """

    method: str
    vectors: NDArray[np.float32]
    p_helpful: NDArray[np.float32]
    p_harmful: NDArray[np.float32]
    accuracy: NDArray[np.float32]
    loss: NDArray[np.float32] | None = None
    spread: NDArray[np.float32] | None = None
    flipped: NDArray[np.float32] | None = None


class Method(Protocol):
    """What each file of this package offers; options of its own follow as keywords with a default."""

    def fit(
        self,
        helpful: EmbeddingsPerLayer,
        harmful: EmbeddingsPerLayer,
        *,
        rank: int,
        seed: int,
        weights: Weights,
        **options: Any,
    ) -> Directions: ...


def fit(
    method: str,
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
    weights: Weights = None,
    **options: Any,
) -> Directions:
    """Find the directions of every layer.

    Args:
        method: a name of `METHODS`.
        helpful, harmful: [n_layer, n_pairs, n_embd]; row i of both belongs to pair i.
        rank: directions per layer; methods other than `svd` and `svd-diff` have one.
        seed: decides initial values and which pairs are held out.
        weights: [n_pairs], positive: how much each pair counts, relative to the others; `None` for all alike.
        **options: of the method, as its own `fit` describes them.

    Raises:
        ValueError: an unknown method or option, shapes that differ, a value that is not finite, a weight that
            is not positive, a rank that the method does not have.
        QueryError: too few pairs.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    module = cast(Method, import_module(f"{__name__}.{method.replace('-', '_')}"))
    known = _options(module)
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{method} has no option {name!r}; {has}")
    return module.fit(helpful, harmful, rank=rank, seed=seed, weights=weights, **options)


def _options(module: Method) -> list[str]:
    keywords = [
        name
        for name, parameter in signature(module.fit).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY
    ]
    return [name for name in keywords if name not in ("rank", "seed", "weights")]
