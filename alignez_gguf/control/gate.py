"""Decides which requests are steered: once, at the end of the prompt, by what the model would say next.

Pure numpy, no I/O. The runtimes ask a gate, `pipeline.gating` fits one.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignez_gguf.errors import SteeringError


@dataclass(frozen=True, eq=False)
class Gate:
    """Opens for a request whose first token, as the unsteered model would draw it, says that it is harmful.

    With p the probabilities of the token after the prompt, it opens where

        sum_i weights[i] log p(tokens[i]) > threshold.

    A request for which it stays closed is answered by the unsteered model, bit for bit. The logits are those
    that the prefill of the prompt computes anyway, so a closed gate costs nothing. Where it opens, what is
    steered of the prompt is computed again: its last token, or all of it in the scope `all` and where a model
    cannot forget the end of a prompt. The arrays are copied and read-only.

    Attributes:
        tokens: int32 [k], the ids of the tokens that are read.
        weights: float32 [k], the weights of their log-probabilities.
        threshold: the score in nat above which the gate opens.

    Raises:
        SteeringError: the arrays do not belong together, or a value is not finite.
    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    threshold: float

    def __post_init__(self) -> None:
        tokens = np.array(self.tokens, np.int32)
        weights = np.array(self.weights, np.float32)
        if tokens.ndim != 1 or tokens.shape != weights.shape or not len(tokens):
            raise SteeringError(
                f"a gate has as many weights as tokens, not {list(weights.shape)} and {list(tokens.shape)}"
            )
        if tokens.min() < 0 or len(np.unique(tokens)) != len(tokens):
            raise SteeringError("the tokens of a gate must be different ids from 0 on")
        if not np.isfinite(weights).all() or not math.isfinite(self.threshold):
            raise SteeringError("the weights and the threshold of a gate must be finite")
        object.__setattr__(self, "threshold", float(self.threshold))
        for name, array in (("tokens", tokens), ("weights", weights)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def digest(self) -> str:
        """The SHA-256 of tokens, weights and threshold, in hex digits."""
        value = hashlib.sha256(self.tokens.tobytes())
        value.update(self.weights.tobytes())
        value.update(repr(self.threshold).encode())
        return value.hexdigest()

    def check_fits(self, n_vocab: int) -> None:
        """Refuse a model that lacks a token of the gate.

        Args:
            n_vocab: the number of tokens of the model.

        Raises:
            SteeringError: it lacks one.
        """
        if self.tokens.max() >= n_vocab:
            raise SteeringError(
                f"the gate reads token {self.tokens.max()}, but the model has {n_vocab}; use a control file "
                "made for this model"
            )

    def score(self, logits: ArrayLike) -> float:
        """Return the weighted log-probabilities, in nat, of the logits [n_vocab] after a prompt.

        Raises:
            SteeringError: the model has fewer tokens, or the logits are not finite.
        """
        row = np.asarray(logits, np.float64)
        self.check_fits(len(row))
        largest = row.max()
        log_sum = largest + math.log(np.exp(row - largest).sum())
        score = float(self.weights.astype(np.float64) @ (row[self.tokens] - log_sum))
        if not math.isfinite(score):
            raise SteeringError("the gate cannot be read: the model gives a token that it reads no logit")
        return score

    def opens(self, logits: ArrayLike) -> bool:
        """Whether a request is steered, by the logits [n_vocab] after its prompt; see `score`."""
        return self.score(logits) > self.threshold
