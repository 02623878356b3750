"""The label-free score of an edit: no judge, no labels, only what the model says under its personas.

The model's next-token distribution at the start of its answer, P, is compared with those it has under the
helpful and the harmful persona. An edit is good if it moves the plain answer towards the first and away from
the second:

    gain = [KL(P_help || P_base) - KL(P_help || P_steered)] - [KL(P_harm || P_base) - KL(P_harm || P_steered)]
         = sum_v (P_help - P_harm)(v) (log P_steered(v) - log P_base(v))

in nat, averaged over queries that no direction was fitted on: so far it shifts the log-odds of the helpful
persona against the harmful one. What it costs is KL(P_base || P_steered) per token of the base model's own
answers. Both are weighed by

    net = mean log 2 sigmoid(gain) + log(1 - leak) - sum of KL(P_base || P_steered) after the first token

along the helpful persona's answers: the change in the log-probability that an answer begins as that persona's
would, where both were even, and then goes on as fluently as it did. The sigmoid is taken query by query, so
that much for a few queries does not outweigh little for many. The leak is the probability that moves to
first tokens which neither the base model nor a persona would say. This module knows nothing of engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.edits import Edits
from alignez_gguf.scope import Scope

ANSWER_TOKENS = 24
"""Tokens of an answer along which the divergence is measured."""

DIVERGENCE_QUERIES = 24
"""Queries over which the divergence is measured."""

STEERINGS_TOGETHER = 6
"""That a model is asked for at once, where there are so many."""

_PLAUSIBLE = 0.05
"""A token is one that a distribution would say if it is at least so probable, relative to the likeliest."""


@dataclass(frozen=True)
class Limits:
    """What the two figures of a divergence may be at most, in nat, for it to be worth measuring further."""

    per_token: float = math.inf
    after_first: float = math.inf


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Divergence:
    """How far steering moves a model along given answers, KL(P_base || P_steered), as far as it was measured.

    Attributes:
        along_helpful: what each answer of the helpful persona adds to `after_first`.
        along_base: what each answer of the base model adds to `per_token`.
        n_answers: of each kind, measured or not.
    """

    along_helpful: tuple[float, ...]
    along_base: tuple[float, ...]
    n_answers: int

    @property
    def per_token(self) -> float:
        """Mean over the tokens of the base model's own answers, in nat; or what is sure of it."""
        return sum(self.along_base)

    @property
    def after_first(self) -> float:
        """Sum over the tokens after the first of the helpful persona's answers, in nat per answer; or what is
        sure of it."""
        return sum(self.along_helpful)

    @property
    def is_whole(self) -> bool:
        """Whether all answers were measured."""
        return len(self.along_helpful) == len(self.along_base) == self.n_answers

    def exceeds(self, limits: Limits) -> bool:
        """Whether one of the figures is sure to exceed its limit."""
        return self.per_token > limits.per_token or self.after_first > limits.after_first

    def exceeds_sooner_along_helpful(self, limits: Limits) -> bool:
        """Whether `after_first` will exceed its limit before `per_token` does, by the answers so far.

        Of both there is one first, and then those that are left.
        """
        n_helpful, n_base = len(self.along_helpful), len(self.along_base)
        if not n_helpful or not n_base or self.n_answers in (n_helpful, n_base):
            return n_helpful <= n_base
        # Shares of the limits by answer, multiplied by both limits, since a limit may be 0.
        helpful = self.after_first / n_helpful * limits.per_token
        base = self.per_token / n_base * limits.after_first
        return helpful > base or (helpful == base and n_helpful <= n_base)

    def suffices_for(self, limits: Limits) -> bool:
        """Whether it was measured as far as these limits ask for."""
        return self.is_whole or self.exceeds(limits)

    def within(self, limits: Limits) -> Divergence:
        """The part that would have been measured with these limits."""
        return divergence_along(self.along_helpful, self.along_base, self.n_answers, limits)


def divergence_along(
    along_helpful: Iterable[float], along_base: Iterable[float], n_answers: int, limits: Limits
) -> Divergence:
    """The divergence along answers until it exceeds a limit, first of the kind that will sooner.

    Args:
        along_helpful, along_base: what each answer adds; asked for no more than is needed.
        n_answers: how many there are of each kind.
    """
    helpful, base = iter(along_helpful), iter(along_base)
    found = Divergence((), (), n_answers)
    while not found.suffices_for(limits):
        if found.exceeds_sooner_along_helpful(limits):
            more = replace(found, along_helpful=(*found.along_helpful, *islice(helpful, 1)))
        else:
            more = replace(found, along_base=(*found.along_base, *islice(base, 1)))
        if more == found:  # these are a part, measured with other limits
            break
        found = more
    return found


def token_divergence(
    along_helpful: Iterable[Sequence[float]],
    along_base: Iterable[Sequence[float]],
    n_answers: int,
    n_tokens: int,
    limits: Limits,
) -> Divergence:
    """`divergence_along` where each answer comes as the divergences at its tokens, in nat.

    Args:
        n_tokens: of all answers of the base model.
    """
    return divergence_along(
        (sum(each[1:]) / n_answers for each in along_helpful),
        (sum(each) / n_tokens for each in along_base),
        n_answers,
        limits,
    )


class Steering(NamedTuple):
    """Edits, and the strength at which they act."""

    edits: Edits
    strength: float = 1.0


class SteeredModel(Protocol):
    """What a score asks of a model, over its queries, where the tokens of a scope are steered."""

    def first_token_logprobs(self, steerings: Sequence[Steering], *, scope: Scope) -> NDArray[np.float32]:
        """Log-probabilities of the first token of the answer, [n_steerings, n_queries, n_vocab].

        Neighbours that are the same edits, at several strengths, may cost less.
        """
        ...

    def divergence(self, edits: Edits, limits: Limits = NO_LIMITS, *, scope: Scope) -> Divergence:
        """How far `edits` move the model along answers of at most `ANSWER_TOKENS` tokens.

        Every answer adds to it, so that a figure may be sure to exceed its limit before all are measured;
        measuring ends there.
        """
        ...


@dataclass(frozen=True)
class Figures:
    """What is known of an edit.

    Attributes:
        gains: of each query, in nat.
        leak: mean over the queries, a probability.
        divergence: `None` where it was not measured at all.
    """

    gains: tuple[float, ...]
    leak: float = 0.0
    divergence: Divergence | None = None

    @cached_property
    def gain(self) -> float:
        """Mean over the queries, in nat."""
        return float(np.mean(self.gains))

    @cached_property
    def standard_error(self) -> float:
        """Of the gain, in nat; infinite where there is a single query."""
        count = len(self.gains)
        return float(np.std(self.gains, ddof=1) / np.sqrt(count)) if count > 1 else math.inf

    @cached_property
    def onset(self) -> float:
        """Mean of log 2 sigmoid(gain) over the queries, in nat."""
        return math.log(2) - float(np.logaddexp(0.0, np.negative(self.gains)).mean())

    @property
    def kl(self) -> float | None:
        """Mean divergence along the base model's answers, nat per token, if it was measured to its end."""
        whole = self._whole_divergence
        return None if whole is None else whole.per_token

    @property
    def bound(self) -> float:
        """What `net` can be at most, in nat: onset + log(1 - leak)."""
        return self.onset + (math.log1p(-self.leak) if self.leak < 1 else -math.inf)

    @property
    def net(self) -> float | None:
        """What a choice maximises, in nat, if the divergence was measured to its end."""
        whole = self._whole_divergence
        return None if whole is None else self.bound - whole.after_first

    @property
    def _whole_divergence(self) -> Divergence | None:
        return self.divergence if self.divergence is not None and self.divergence.is_whole else None


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores edits of one model by the personas of one aspect.

    Attributes:
        model: measures an edit.
        scope: the time steps that are steered.
        p_helpful, p_harmful: float32 [n_queries, n_vocab], next-token probabilities under the personas.
        base: float32 [n_queries, n_vocab], next-token log-probabilities without an edit.
    """

    model: SteeredModel
    scope: Scope
    p_helpful: NDArray[np.float32]
    p_harmful: NDArray[np.float32]
    base: NDArray[np.float32]

    @property
    def n_queries(self) -> int:
        return len(self.base)

    def first_tokens(self, steerings: Sequence[Steering]) -> list[Figures]:
        """Figures without the divergence of each steering, which cost a token per query."""
        steered = self.model.first_token_logprobs(steerings, scope=self.scope)
        return [self.figures(logprobs) for logprobs in steered]

    def divergence(self, edits: Edits, limits: Limits = NO_LIMITS) -> Divergence:
        """What `edits` cost, measured until that exceeds a limit."""
        return self.model.divergence(edits, limits, scope=self.scope)

    def figures(self, steered: NDArray[np.float32]) -> Figures:
        """Figures without the divergence of first-token log-probabilities [n_queries, n_vocab]."""
        each = gains(self.p_helpful, self.p_harmful, self.base, steered)
        leak = leaks(self.p_helpful, self.p_harmful, self.base, steered).mean()
        return Figures(tuple(each.tolist()), float(leak))

    def score(self, edits: Edits) -> Figures:
        """All figures of `edits`."""
        return replace(self.first_tokens([Steering(edits)])[0], divergence=self.divergence(edits))


def gains(
    p_helpful: NDArray[np.float32],
    p_harmful: NDArray[np.float32],
    base: NDArray[np.float32],
    steered: NDArray[np.float32],
) -> NDArray[np.float64]:
    """The gain of each query, [n_queries], in nat.

    Args:
        p_helpful, p_harmful: [n_queries, n_vocab], probabilities under the personas.
        base, steered: [n_queries, n_vocab], log-probabilities of the plain prompt.
    """
    return np.asarray(np.sum((p_helpful - p_harmful) * (steered - base), axis=1, dtype=np.float64))


def leaks(
    p_helpful: NDArray[np.float32],
    p_harmful: NDArray[np.float32],
    base: NDArray[np.float32],
    steered: NDArray[np.float32],
) -> NDArray[np.float64]:
    """The probability that steering moves to implausible tokens, for each query, [n_queries].

    A token is plausible if the base model or a persona gives it at least 5% of the probability of its
    likeliest one (the rule of min-p sampling). Arguments as those of `gains`.
    """
    p_base = np.exp(base)
    plausible = np.zeros(base.shape, dtype=bool)
    for p in (p_base, p_helpful, p_harmful):
        plausible |= p >= _PLAUSIBLE * p.max(axis=1, keepdims=True)
    moved = np.sum((np.exp(steered) - p_base) * ~plausible, axis=1, dtype=np.float64)
    return np.clip(moved, 0.0, 1.0)
