"""The result of a method that finds directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions that a method found in each layer, and the figures of its fit.

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
        loss: float32 [n_layer], the loss of the probe; `None` for a method without one.
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
