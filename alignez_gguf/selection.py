"""The label-free choice of an edit: no judge, no labels, only what the model says under its personas.

The model's next-token distribution at the start of its answer, P, is compared with those it has under the
helpful and the harmful persona. An edit is good if it moves the plain answer towards the first and away from
the second:

    gain = [KL(P_help || P_base) - KL(P_help || P_steered)] - [KL(P_harm || P_base) - KL(P_harm || P_steered)]
         = sum_v (P_help - P_harm)(v) (log P_steered(v) - log P_base(v))

in nat, averaged over queries that no direction was fitted on. An edit is affordable if it stays within a
budget on KL(P_base || P_steered) per token of the base model's own answers: that keeps it fluent. This module
knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

_AMOUNTS: dict[Decision, tuple[float, ...]] = {
    "remove": (0.0,),
    "add": (0.5, 1.0, 1.5),
    "remove+add": (0.25, 0.5, 0.75, 1.0, 1.5),
}
_FINALISTS = 4
"""Candidates on all layers that are tried on fewer layers too."""

_CERTAINTY = 1.645
"""Standard errors by which a mean gain must exceed zero: one-sided 95%."""


class SteeredModel(Protocol):
    """What the selection asks of a model, over its queries."""

    def first_token_logprobs(self, edits: Edits) -> NDArray[np.float32]:
        """[n_queries, n_vocab]: log-probabilities of the first token of the answer, steered by `edits`."""
        ...

    def divergence(self, edits: Edits) -> float:
        """Mean KL(P_base || P_steered) along the base model's answers, nat per token."""
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
    """A candidate and its figures. `kl` is measured only for those that could be chosen."""

    candidate: Candidate
    gain: float
    standard_error: float
    kl: float | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the gain is above zero beyond what the choice of queries explains."""
        return self.gain > _CERTAINTY * self.standard_error


@dataclass(frozen=True)
class Selection:
    """What was chosen, and everything that was tried, best gain first."""

    chosen: Scored
    tried: tuple[Scored, ...]
    n_queries: int
    budget: float


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
    """Looks for the candidate of the greatest gain within the budget; deterministic.

    First every source and operation on all layers, then the best ones on parts of the model.

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
        affordable = self._affordable(len(self._scored))
        chosen = next((scored for scored in affordable if scored.is_certain), None)
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
            self._scored[candidate] = Scored(candidate, float(each.mean()), error)
            self.advance(str(candidate))

    def _finalists(self) -> list[Scored]:
        """The best affordable ones, then the best others: on fewer layers they may be affordable."""
        affordable = list(self._affordable(_FINALISTS))
        costly = [scored for scored in self._ranked() if scored.gain > 0 and scored not in affordable]
        return [*affordable, *costly][:_FINALISTS]

    def _ranked(self) -> list[Scored]:
        return sorted(self._scored.values(), key=lambda scored: -scored.gain)

    def _affordable(self, count: int) -> Iterator[Scored]:
        """The best candidates within the budget; measures only as many as it takes."""
        found = 0
        for scored in self._ranked():
            if found == count or scored.gain <= 0:
                return
            if scored.kl is None:
                kl = self.model.divergence(self.edits_of(scored.candidate))
                scored = Scored(scored.candidate, scored.gain, scored.standard_error, kl)
                self._scored[scored.candidate] = scored
                self.advance(str(scored.candidate))
            if scored.kl is not None and scored.kl <= self.budget:
                found += 1
                yield scored


def _best(ranked: Sequence[Scored]) -> str:
    """What the greatest gain was, and what it would cost."""
    if not ranked:
        return "no direction was found"
    best = ranked[0]
    cost = "" if best.kl is None else f" at {best.kl:.3g} nat per token"
    return f"the best, {best.candidate}, gains {best.gain:+.3f} +- {best.standard_error:.3f}{cost}"
