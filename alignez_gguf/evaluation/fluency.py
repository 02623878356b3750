"""Whether an answer reads well: its text shows loops and debris, the base model finds words without order.

The limit of the likelihood lies between what the base model writes itself and the same words in random
order, so that it fits every model and tokenizer, and fluent answers that the base model would not give pass.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignez_gguf.text.repetition import REPETITIVE, is_broken, repetition

FIRST_WORD_NAT = 8.0
"""Nat that the first word of an answer may cost: "That" is unlikely at first, whatever follows."""
OWN_QUANTILE = 0.95
"""This share of the base model's own answers is taken to read well."""
LEAST_WORDS = 6
"""Texts of fewer words are not put in random order: they have too little order to lose."""


@dataclass(frozen=True)
class Fluency:
    """The measures of how well an answer is formed.

    Attributes:
        nat_per_token: mean negative log-likelihood under the base model; None for an empty answer, and where
            only the text is known.
        repetition: share of three-word sequences that occurred before.
        clean_stop: whether it ended by itself.
        n_tokens: length of the answer, where the likelihood was measured.
    """

    nat_per_token: float | None
    repetition: float
    clean_stop: bool
    n_tokens: int | None = None

    @classmethod
    def of_text(cls, text: str, *, clean_stop: bool = True) -> Fluency:
        """Measure an answer without a model."""
        return cls(None, repetition(text), clean_stop)


@dataclass(frozen=True)
class FluencyRule:
    """Decides whether an answer reads well.

    Attributes:
        limit: the greatest nat per token, see `fluency_limit`; infinite where no model measures answers.
    """

    limit: float = float("inf")

    def reads_well(self, text: str, fluency: Fluency) -> bool:
        """Whether an answer is whole text: not empty, no loop, no debris, and its words in order."""
        if is_broken(text) or fluency.repetition > REPETITIVE:
            return False
        if fluency.nat_per_token is None:
            return True
        allowance = FIRST_WORD_NAT / fluency.n_tokens if fluency.n_tokens else 0.0
        return fluency.nat_per_token - allowance <= self.limit


def fluency_limit(own: Sequence[Fluency], disordered: Sequence[Fluency]) -> float:
    """Return the greatest nat per token with which an answer reads well; infinite without measurements.

    Args:
        own: the base model's own answers.
        disordered: such answers with their words in random order.
    """
    orderly, random_order = (
        [answer.nat_per_token for answer in answers if answer.nat_per_token is not None]
        for answers in (own, disordered)
    )
    if not orderly or not random_order:
        return float("inf")
    return float(np.quantile(orderly, OWN_QUANTILE) + np.median(random_order)) / 2


def disorder(text: str) -> str | None:
    """Shuffle the words of a text, the same way every time; return None where there are too few."""
    words = text.split()
    if len(words) < LEAST_WORDS:
        return None
    random.Random(text).shuffle(words)
    return " ".join(words)
