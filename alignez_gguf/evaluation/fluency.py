"""Does an answer read well? Its text alone tells loops and debris, the base model tells words without order.

The limit of the likelihood lies between what the base model writes itself and the same words in random
order, so that it fits every model and tokenizer, and fluent answers that the base model would not give pass.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignez_gguf.evaluation.judging import Fluency

REPETITIVE = 0.25
"""An answer does not read well if a greater share of its three-word sequences occurred before."""
FIRST_WORD_NAT = 8.0
"""The first word of an answer may cost this much: "That" is unlikely at first, whatever follows."""
OWN_QUANTILE = 0.95
"""This share of the base model's own answers is taken to read well."""
LEAST_WORDS = 6
"""Fewer words have no order to lose."""

_LOOP = re.compile(r"([^\s.,\-=_*#~+|]{1,12}?)\1{2,}")
"""Characters that come again and again; rules such as "-----" are no words."""
_LONG_LOOP = 16
"""Characters of a loop that nobody writes."""
_TAG = re.compile(r"</?\w[^<>]*>")
_LEAST_LETTERS = 0.4
"""A text with a smaller share of letters and digits among its characters, spaces apart, is debris."""


@dataclass(frozen=True)
class FluencyRule:
    """Tells answers that read well.

    Attributes:
        limit: greatest nat per token, see `fluency_limit`; infinite where no model measures answers.
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


def is_broken(text: str) -> bool:
    """Whether a text is empty, runs in a loop, or consists of debris such as tags and signs."""
    told = "".join(_TAG.sub("", text).split())
    n_letters = sum(character.isalnum() for character in told)
    loops = any(len(loop[0]) >= _LONG_LOOP for loop in _LOOP.finditer(text))
    return loops or n_letters <= _LEAST_LETTERS * len(told) or "\ufffd" in told


def fluency_limit(own: Sequence[Fluency], disordered: Sequence[Fluency]) -> float:
    """The greatest nat per token with which an answer reads well; infinite where nothing was measured.

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
    """The words of a text in random order, the same every time; None where there are too few."""
    words = text.split()
    if len(words) < LEAST_WORDS:
        return None
    random.Random(text).shuffle(words)
    return " ".join(words)
