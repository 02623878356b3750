"""Log-probabilities from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities [n_vocab] of `logits` [n_vocab]."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted))), np.float32)
