"""The label-free choice of an edit: no judge, no labels, only what the model says under its personas.

The model's next-token distribution at the start of its answer, P, is compared with those it has under the
helpful and the harmful persona. An edit is good if it moves the plain answer towards the first and away from
the second:

    gain = [KL(P_help || P_base) - KL(P_help || P_steered)] - [KL(P_harm || P_base) - KL(P_harm || P_steered)]
         = sum_v (P_help - P_harm)(v) (log P_steered(v) - log P_base(v))

in nat, averaged over queries that no direction was fitted on: so far it shifts the log-odds of the helpful
persona against the harmful one. An edit is affordable if KL(P_base || P_steered) per token of the base
model's own answers stays within a budget, and of those that are, the best has the greatest

    net = log 2 sigmoid(gain) + log(1 - leak) - sum over the tokens after the first of KL(P_base || P_steered)

along the helpful persona's answers: the change in the log-probability that an answer begins as that persona's
would, where both were even, and then goes on as fluently as it did. The leak is the probability that moves to
first tokens which neither the base model nor a persona would say. This module knows nothing of engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.activations import ReadingPosition
from alignez_gguf.edits import Decision, Edits
from alignez_gguf.errors import NoGainError

DEFAULT_BUDGET = 0.1
"""Nat per token."""

ANSWER_TOKENS = 24
"""Tokens of an answer along which the divergence is measured."""

_AMOUNTS: dict[Decision, tuple[float, ...]] = {
    "remove": (0.0,),
    "add": (0.5, 1.0, 2.0, 4.0),
    "remove+add": (0.25, 0.5, 1.0, 2.0, 4.0),
}
_FINER = (0.7, 1.4)
"""Factors by which the amounts of the finalists are varied."""

_FINALISTS = 4
"""Candidates on all layers that are tried on fewer layers too."""

_PLAUSIBLE = 0.05
"""A token is one that a distribution would say if it is at least so probable, relative to the likeliest."""

_CERTAINTY = 1.645
"""Standard errors by which a mean gain must exceed zero: one-sided 95%."""


@dataclass(frozen=True)
class Divergence:
    """How far steering moves a model along given answers, KL(P_base || P_steered).

    Attributes:
        per_token: mean over the tokens of the base model's own answers, in nat.
        after_first: sum over the tokens after the first of the helpful persona's answers, in nat per answer.
    """

    per_token: float
    after_first: float


class SteeredModel(Protocol):
    """What the selection asks of a model, over its queries."""

    def first_token_logprobs(self, edits: Edits) -> NDArray[np.float32]:
        """[n_queries, n_vocab]: log-probabilities of the first token of the answer, steered by `edits`."""
        ...

    def divergence(self, edits: Edits) -> Divergence:
        """How far `edits` move the model along answers of at most `ANSWER_TOKENS` tokens."""
        ...


@dataclass(frozen=True)
class Source:
    """Where directions come from."""

    method: str
    reading: ReadingPosition
    rank: int


@dataclass(frozen=True)
class Candidate:
    """One edit that may be chosen."""

    source: Source
    operation: Decision
    amount: float
    """Share of the class gap that is added; 0 for a mere removal."""
    layers: tuple[int, ...]

    def __str__(self) -> str:
        amount = f" {self.amount:g}x" if self.amount else ""
        return (
            f"{self.source.method} rank {self.source.rank}, {self.source.reading}, {self.operation}{amount}"
        )


@dataclass(frozen=True)
class Scored:
    """A candidate and its figures. The divergence is measured only for those that could be chosen."""

    candidate: Candidate
    gain: float
    standard_error: float
    leak: float = 0.0
    divergence: Divergence | None = None

    @property
    def kl(self) -> float | None:
        """Mean divergence along the base model's answers, nat per token, if it was measured."""
        return None if self.divergence is None else self.divergence.per_token

    @property
    def bound(self) -> float:
        """What `net` can be at most, in nat: log 2 sigmoid(gain) + log(1 - leak)."""
        begins_well = math.log(2.0) - float(np.logaddexp(0.0, -self.gain))
        return begins_well + (math.log1p(-self.leak) if self.leak < 1 else -math.inf)

    @property
    def net(self) -> float | None:
        """What a choice maximises, in nat, if the divergence was measured."""
        return None if self.divergence is None else self.bound - self.divergence.after_first

    @property
    def is_certain(self) -> bool:
        """Whether the gain is above zero beyond what the choice of queries explains."""
        return self.gain > _CERTAINTY * self.standard_error


@dataclass(frozen=True)
class Selection:
    """What was chosen, and everything that was tried, the best bound on the net first."""

    chosen: Scored
    tried: tuple[Scored, ...]
    n_queries: int
    budget: float

    @property
    def affordable(self) -> list[Scored]:
        """Those that were measured and found within the budget, best net first."""
        within = [scored for scored in self.tried if scored.kl is not None and scored.kl <= self.budget]
        return sorted(within, key=lambda scored: -(scored.net or 0.0))


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


def layer_sets(layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The parts of `layers` that are tried besides the whole: lower, upper and middle half, two thirds."""
    count = len(layers)
    half, third, quarter = count // 2, count // 3, count // 4
    parts = (
        layers[:half],
        layers[half:],
        layers[quarter : count - quarter],
        layers[: count - third],
        layers[third:],
    )
    return [part for part in dict.fromkeys(parts) if 0 < len(part) < count]


def span(layers: tuple[int, ...]) -> str:
    """Layers as people write them: "0-5", or "0,2,4"."""
    if layers == tuple(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


@dataclass
class Search:
    """Looks for the candidate of the greatest net within the budget; deterministic.

    First every source and operation on all layers, then the best ones on parts of the model, then other
    amounts of the best on these.

    Attributes:
        model: measures an edit.
        edits_of: makes the edits of a candidate.
        p_helpful, p_harmful: [n_queries, n_vocab], next-token probabilities under the personas.
        budget: nat per token.
        advance: called after every measurement, with a line about it.
    """

    model: SteeredModel
    edits_of: Callable[[Candidate], Edits]
    p_helpful: NDArray[np.float32]
    p_harmful: NDArray[np.float32]
    budget: float = DEFAULT_BUDGET
    advance: Callable[[str], None] = lambda _: None
    _scored: dict[Candidate, Scored] = field(default_factory=dict)

    def run(self, sources: Sequence[Source], layers: tuple[int, ...]) -> Selection:
        """Choose among `sources`, and among `layers` and parts of them.

        Raises:
            NoGainError: nothing affordable gains for certain.
        """
        base = self.model.first_token_logprobs({})
        for source, (operation, amounts) in product(sources, _AMOUNTS.items()):
            for amount in amounts:
                self._score(Candidate(source, operation, amount, layers), base)
        for finalist, part in product(self._finalists(), layer_sets(layers)):
            self._score(replace(finalist.candidate, layers=part), base)
        for finalist, factor in product(self._finalists(), _FINER):
            self._score(replace(finalist.candidate, amount=factor * finalist.candidate.amount), base)
        chosen = next(iter(self._affordable(1, certain=True)), None)
        ranked = self._ranked()
        if chosen is None:
            raise NoGainError(
                f"nothing makes this model safer for certain within {self.budget:g} nat per token "
                f"({_best(ranked)}); give more queries, raise --kl-budget, or try a larger model"
            )
        return Selection(chosen, tuple(ranked), n_queries=len(base), budget=self.budget)

    def _score(self, candidate: Candidate, base: NDArray[np.float32]) -> None:
        edits = self.edits_of(candidate)
        if edits and candidate not in self._scored:
            steered = self.model.first_token_logprobs(edits)
            each = gains(self.p_helpful, self.p_harmful, base, steered)
            error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("inf")
            leak = float(leaks(self.p_helpful, self.p_harmful, base, steered).mean())
            self._scored[candidate] = Scored(candidate, float(each.mean()), error, leak)
            self.advance(str(candidate))

    def _finalists(self) -> list[Scored]:
        """The best affordable ones, then the best others: on fewer layers they may be affordable."""
        affordable = self._affordable(_FINALISTS)
        costly = [scored for scored in self._ranked() if scored.gain > 0 and scored not in affordable]
        return [*affordable, *costly][:_FINALISTS]

    def _ranked(self) -> list[Scored]:
        return sorted(self._scored.values(), key=lambda scored: -scored.bound)

    def _affordable(self, count: int, *, certain: bool = False) -> list[Scored]:
        """The `count` best candidates within the budget, or of the certain ones, best net first.

        Measures the divergence of only as many as it takes.
        """
        found: list[tuple[float, Scored]] = []
        for scored in self._ranked():
            if sum(net >= scored.bound for net, _ in found) >= count:
                break
            if scored.gain <= 0 or (certain and not scored.is_certain):
                continue
            measured = self._measured(scored)
            if measured.kl is not None and measured.net is not None and measured.kl <= self.budget:
                found.append((measured.net, measured))
        found.sort(key=lambda pair: -pair[0])
        return [scored for _, scored in found[:count]]

    def _measured(self, scored: Scored) -> Scored:
        if scored.divergence is None:
            scored = replace(scored, divergence=self.model.divergence(self.edits_of(scored.candidate)))
            self._scored[scored.candidate] = scored
            self.advance(str(scored.candidate))
        return scored


def _best(ranked: Sequence[Scored]) -> str:
    """What the greatest gain was, and what it would cost."""
    if not ranked:
        return "no direction was found"
    best = ranked[0]
    cost = "" if best.kl is None else f" at {best.kl:.3g} nat per token"
    return f"the best, {best.candidate}, gains {best.gain:+.3f} +- {best.standard_error:.3f}{cost}"
