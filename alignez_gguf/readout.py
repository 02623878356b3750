"""The hidden states that are read: at which tokens, of which part of a layer. Imports no other module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Hook = Literal["mlp", "residual"]
"""The hidden state of a layer: the output of its MLP, or the residual stream at the end of its block."""

HOOKS: tuple[Hook, ...] = ("mlp", "residual")

Pooling = Literal["last", "mean"]
"""The tokens that are read: the last one, or the mean over those of the response."""


@dataclass(frozen=True)
class Readout:
    """The hidden state that is read of every layer, and at which tokens."""

    hook: Hook = "mlp"
    pooling: Pooling = "last"


ReadingPosition = Literal["prompt", "response", "response-mean", "verdict", "refusal"]
"""The tokens at which the two sides of a contrast are read: the last one of query and response, as in the
paper; all of the response, as a mean; the last one of the prompt that asks for the response under a persona;
or the last one of the plain prompt, of a query that the safety-first persona declines against one that it
answers ("verdict"), or of one that the model itself declines against one that it complies with, where the
persona declines both ("refusal")."""
