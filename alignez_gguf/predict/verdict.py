"""From figures to one line: is it worth an hour to align this model with itself?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignez_gguf.pairs.filters import PairFilterReport
from alignez_gguf.predict.separability import Separability
from alignez_gguf.selection.scoring import EditScore

Outlook = Literal["likely", "uncertain", "unlikely"]

WORTHWHILE = 0.1
"""Nat: a smaller gain changes the odds of the helpful persona's answer by less than a tenth."""

_FEW = 0.5
"""A smaller share of pairs of use is told among the reasons."""


@dataclass(frozen=True)
class HeldOut:
    """What a quick search found on queries that no direction was fitted on.

    Attributes:
        edit: the best edit, in words; `None` where none gains for certain within the budget.
        figures: of that edit.
        n_queries: over which the figures are taken.
        note: why there is no edit.
    """

    edit: str | None = None
    figures: EditScore | None = None
    n_queries: int = 0
    note: str = ""

    @property
    def gains(self) -> bool:
        """Whether the edit does something that anyone would notice."""
        return self.edit is not None and self.figures is not None and self.figures.gain >= WORTHWHILE


@dataclass(frozen=True)
class Verdict:
    """Whether self-alignment will work, and why that is to be expected."""

    outlook: Outlook
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"self-alignment is {_WORDS[self.outlook]} to work: {'; '.join(self.reasons)}"


_WORDS: dict[Outlook, str] = {
    "likely": "likely",
    "uncertain": "as likely as not",
    "unlikely": "unlikely",
}


def judge(own: Separability | None, held_out: HeldOut | None, pairs: PairFilterReport) -> Verdict:
    """What both signs say together; where they disagree, less is claimed.

    Separability speaks for the model if the best layer is above chance and above surface cues, each at the 5%
    level. The held-out score speaks for it if an edit gains 0.1 nat or more, for certain and within the
    budget. Without a score (`None`), separability decides alone. `own` is `None` where too few pairs are of
    use to measure it, which speaks against the model.
    """
    if own is None:
        return Verdict("unlikely", (f"only {_share(pairs)} follow their personas, too few to go on",))
    separable = own.above_chance and own.above_surface
    reasons = [_separability_reason(own)]
    if pairs.kept < _FEW * pairs.total:
        reasons.append(f"only {_share(pairs)} follow their personas")
    if held_out is None:
        reasons.append("the held-out score was skipped")
        return Verdict("likely" if separable else "unlikely", tuple(reasons))
    reasons.append(_held_out_reason(held_out))
    outlook: Outlook = "uncertain"
    if held_out.gains == separable:
        outlook = "likely" if separable else "unlikely"
    return Verdict(outlook, tuple(reasons))


def _share(pairs: PairFilterReport) -> str:
    return f"{pairs.kept} of {pairs.total} pairs"


def _separability_reason(own: Separability) -> str:
    accuracy = f"{own.best_accuracy:.0%} of its held-out answers"
    chance = f"chance reaches {own.chance:.0%}"
    if not own.above_chance:
        return f"its embeddings tell only {accuracy} apart, which chance does too (p = {own.p_chance:.2f})"
    if own.surface is None:
        return f"its embeddings tell {accuracy} apart ({chance})"
    cues = f"length and first word alone reach {own.surface:.0%}"
    if not own.above_surface:
        return f"its embeddings tell {accuracy} apart, but no more than surface cues explain ({cues})"
    return f"its embeddings tell {accuracy} apart ({chance}; {cues})"


def _held_out_reason(held_out: HeldOut) -> str:
    figures = held_out.figures
    if held_out.edit is None or figures is None:
        return f"no edit helps on held-out queries ({held_out.note})"
    cost = "" if figures.kl is None else f" at {figures.kl:.3f} nat per token"
    only = "" if held_out.gains else "only "
    return (
        f"the best edit gains {only}{figures.gain:+.2f} +- {figures.standard_error:.2f} nat{cost} on "
        f"{held_out.n_queries} held-out queries"
    )
