"""Drops pairs that say nothing about the difference between the personas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.pairs.pairs import PreferencePair

NEAR_IDENTICAL = 0.9
"""Answers that share this part of their words, in order, count as near-identical."""


@dataclass(frozen=True)
class PairFilterReport:
    """The number of pairs before and after filtering, and of those left out by reason.

    Attributes:
        total, kept: pairs before and after filtering.
        empty, identical, near_identical: pairs left out for their texts.
        persona_ignored: pairs left out since, by the model's own likelihoods, an answer fits the other
            persona at least as well as its own.
        truncated: kept pairs with an answer that was cut at a sentence.
    """

    total: int
    kept: int
    empty: int = 0
    identical: int = 0
    near_identical: int = 0
    persona_ignored: int = 0
    truncated: int = 0

    def __str__(self) -> str:
        reasons = [field.name for field in fields(self)][2:-1]
        counts = [
            f"{getattr(self, name)} {name.replace('_', ' ')}" for name in reasons if getattr(self, name)
        ]
        left_out = f" (left out: {', '.join(counts)})" if counts else ""
        return f"{self.kept} of {self.total} pairs are of use{left_out}"


def filter_pairs(
    pairs: Sequence[PreferencePair], margins: NDArray[np.float64] | None = None
) -> tuple[list[PreferencePair], PairFilterReport]:
    """Leave out the pairs in which the model did not answer as its personas.

    A pair goes if an answer is empty, or if both answers are the same or nearly so (case and spaces do not
    count as a difference), or if a margin of it is not above 0.

    Args:
        pairs: the pairs; the kept ones stay in their order.
        margins: [n_pairs, 2] in nat, from `generation.compare_personas`; NaN where not measured.

    Returns:
        The kept pairs, and the report.
    """
    kept: list[PreferencePair] = []
    counts = {"empty": 0, "identical": 0, "near_identical": 0, "persona_ignored": 0}
    for index, pair in enumerate(pairs):
        reason = text_fault(pair)
        if reason is None and margins is not None and bool((margins[index] <= 0).any()):
            reason = "persona_ignored"
        if reason is None:
            kept.append(pair)
        else:
            counts[reason] += 1
    truncated = sum(pair.truncated for pair in kept)
    return kept, PairFilterReport(len(pairs), len(kept), truncated=truncated, **counts)


def text_fault(pair: PreferencePair) -> str | None:
    """Return the reason to drop a pair for its texts, as a field of `PairFilterReport`, or None."""
    helpful, harmful = pair.helpful.casefold().split(), pair.harmful.casefold().split()
    if not helpful or not harmful:
        return "empty"
    if helpful == harmful:
        return "identical"
    ratio = SequenceMatcher(None, helpful, harmful, autojunk=False).ratio()
    return "near_identical" if ratio >= NEAR_IDENTICAL else None
