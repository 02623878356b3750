"""The subspace of one class: leading right singular vectors of its stacked embeddings.

"Is Free Self-Alignment Possible?" (arXiv 2406.03642) stacks the embeddings of each class in a layer, one row
for each answer,

    H = [Phi(p_1); ...; Phi(p_n)] = U S V^T,    theta = first rows of V^T

and removes theta_harm, the subspace of the harmful class, from what the layer writes. So `vectors` are those
of the harmful class; `of="helpful"` gives those of the other one.

The rows are not centred. What both classes share is then part of both subspaces, and where it is large, as
the mean of all embeddings of a language model is, the first vector is about that and tells the classes apart
badly; the held-out accuracy shows it. `centring="pooled"` takes the mean of both classes away before;
`svd-diff` takes away what the two answers of a pair share.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.embeddings import EmbeddingsPerLayer, Weights, shift_and_scale
from alignez_gguf.directions.linear import fit_linear
from alignez_gguf.directions.singular import top_right_singular_vectors

Class = Literal["harmful", "helpful"]
SvdCentring = Literal["none", "pooled"]


def fit(
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
    weights: Weights = None,
    of: Class = "harmful",
    centring: SvdCentring = "none",
) -> Directions:
    """Fit the top `rank` right singular vectors of a class; see `alignez_gguf.directions.fit`.

    Each has the sign under which it points towards the helpful mean, as everywhere; a removal does not care.

    Args:
        of: the class whose embeddings are stacked.
        centring: `pooled` subtracts the mean of both classes first; `none` is the paper's.

    Raises:
        ValueError: another class or centring, and what `alignez_gguf.directions.fit` raises.
    """
    if of not in get_args(Class):
        raise ValueError(f"there is no class {of!r}; choose one of {', '.join(get_args(Class))}")
    if centring not in get_args(SvdCentring):
        raise ValueError(
            f"svd has no centring {centring!r}; choose one of {', '.join(get_args(SvdCentring))}"
        )

    def find(x: NDArray[np.float32], rank: int, weights: Weights) -> NDArray[np.float32]:
        rows = x[0] if of == "helpful" else x[1]
        if centring == "pooled":
            rows = rows - shift_and_scale(x, weights)[0]
        return top_right_singular_vectors(rows, rank, weights)

    return fit_linear("svd", find, helpful, harmful, rank, seed, weights)
