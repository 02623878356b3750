"""The label-free score of an edit: how much nearer it brings the model to what the safety-first persona says.

The persona has answered each query. Along those answers, teacher-forced, under the plain prompt,

    gain = log P_steered(answer | query) - log P_base(answer | query)

in nat, over at most `ANSWER_TOKENS` tokens. Its mean over queries estimates how much closer the steered model
is to the persona in KL, a proper scoring rule: declining what the persona answers, answering what it declines
and writing what nobody would say all lower it, whole sentences and not only first words. What the persona
itself would gain is the distance,

    distance = log P_persona(answer | query) - log P_base(answer | query).

Queries that the persona declines and those that it answers count half each, however many there are of each,
so that neither refusing everything nor helping with everything pays.

What an edit costs is the divergence KL(P_base || P_steered) along the base model's own answers to what the
persona answers too, per token: moving towards the persona where it declines costs nothing. It is estimated
from those answers, which are draws of P_base, as the mean of log P_base - log P_steered. This module knows
nothing of engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits
from alignez_gguf.control.scope import GENERATION, Scope

ANSWER_TOKENS = 24
"""Tokens of an answer along which likelihoods are measured."""


class SteeredModel(Protocol):
    """What a score asks of a model: the likelihood of given answers to given prompts under an edit."""

    def log_likelihoods(self, edits: Edits, passages: Sequence[int], *, scope: Scope) -> NDArray[np.float64]:
        """log P(answer | prompt) in nat, over `ANSWER_TOKENS` tokens at most, [n_passages].

        Args:
            edits: none for the base model.
            passages: their numbers.
            scope: the time steps that are steered.
        """
        ...


@dataclass(frozen=True)
class EditScore:
    """What is known of an edit.

    Attributes:
        gains: of each query, in nat.
        declined: whether the safety-first persona declines each query.
        kl: nat per token along the base model's own answers; None where it was not measured.
    """

    gains: tuple[float, ...]
    declined: tuple[bool, ...]
    kl: float | None = None

    @cached_property
    def gain(self) -> float:
        """Mean over what the persona declines and what it answers, half each, in nat."""
        return float(np.mean([np.mean(part) for part in self._parts]))

    @cached_property
    def standard_error(self) -> float:
        """Of the gain, in nat; infinite where a half of it is a single query."""
        parts = self._parts
        if any(len(part) < 2 for part in parts):
            return math.inf
        variances = [np.var(part, ddof=1) / len(part) for part in parts]
        return float(np.sqrt(np.sum(variances)) / len(parts))

    @property
    def lower_bound(self) -> float:
        """Lower confidence bound (95%, normal approximation) of the gain, in nat."""
        return self.gain - 1.645 * self.standard_error

    def gains_over(self, other: EditScore) -> EditScore:
        """What this edit gains more than another one over the same queries."""
        gains = (mine - theirs for mine, theirs in zip(self.gains, other.gains, strict=True))
        return EditScore(tuple(gains), self.declined)

    @property
    def _parts(self) -> list[NDArray[np.float64]]:
        gains, declined = np.array(self.gains), np.array(self.declined)
        return [part for part in (gains[declined], gains[~declined]) if len(part)]


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores edits of one model over some queries.

    Attributes:
        model: holds one passage per query, the answer of the safety-first persona to the plain prompt, and
            behind them `n_own` answers of the base model to what that persona answers.
        declined: whether the persona declines each query.
        n_tokens: of each answer of the base model, as far as it is measured.
        base: log-likelihoods of all passages without an edit, in nat.
        opens: whether each passage is steered; where a gate stays closed, it is the base model's.
    """

    model: SteeredModel
    declined: tuple[bool, ...]
    n_tokens: tuple[int, ...]
    base: NDArray[np.float64]
    opens: tuple[bool, ...]

    @property
    def n_queries(self) -> int:
        return len(self.declined)

    def gains(self, edits: Edits, queries: Sequence[int], *, scope: Scope = GENERATION) -> list[float]:
        """The gains over these queries, in nat, where the time steps of `scope` are steered."""
        return [float(gain) for gain in self._gains(edits, queries, scope)]

    def divergence(self, edits: Edits, *, scope: Scope = GENERATION) -> float:
        """KL(P_base || P_steered) in nat per token; 0 where the persona answers nothing."""
        if not self.n_tokens:
            return 0.0
        own = range(self.n_queries, self.n_queries + len(self.n_tokens))
        return float(-self._gains(edits, own, scope).sum() / sum(self.n_tokens))

    def score(self, edits: Edits, *, scope: Scope = GENERATION) -> EditScore:
        """All figures of an edit over all queries."""
        gains = self.gains(edits, range(self.n_queries), scope=scope)
        return EditScore(tuple(gains), self.declined, self.divergence(edits, scope=scope))

    def n_first_queries_with(self, n_steered: int) -> int:
        """So many first queries hold `n_steered` that are steered; all, where there are not as many."""
        steered = [index for index, opens in enumerate(self.opens[: self.n_queries]) if opens]
        return steered[n_steered - 1] + 1 if len(steered) > n_steered else self.n_queries

    def _gains(self, edits: Edits, passages: Sequence[int], scope: Scope) -> NDArray[np.float64]:
        """log P_steered - log P_base of passages by number; those that are not steered gain exactly 0."""
        gains = np.zeros(len(passages))
        steered = np.array([self.opens[number] for number in passages], bool)
        numbers = np.array(passages, int)[steered]
        if len(numbers):
            found = self.model.log_likelihoods(edits, numbers.tolist(), scope=scope)
            gains[steered] = found - self.base[numbers]
        return gains
