"""The choice of an edit by its label-free score: many candidates on few queries, few on all of them.

Every source of directions is tried in a few operations, amounts and spans of layers on the first queries;
the best go on to more of them, as in successive halving (Jamieson and Talwalkar, 2016); then the best one
goes from neighbour to neighbour while it gets better, and on from there in another scope, where that is
better. What costs more than the budget is not chosen. The gain that the choice was made by is not the one to
believe: `pipeline.confirmation` measures that on other queries. Everything is deterministic. This module
knows nothing of engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit, orthonormal_rows
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.errors import NoGainError
from alignez_gguf.selection.candidates import Candidate, Source, first_candidates, neighbours
from alignez_gguf.selection.scoring import EditScore, Scorer

DEFAULT_BUDGET = 0.1
"""Nat per token."""

ROUNDS = ((4, 20), (12, 6))
"""Steered queries on which candidates are compared, and how many of those go on; at last on all queries."""

_STARTS = 3
"""Sources from the best candidates of which the search goes on."""
_PROMISING = 0.5
"""A share of the gain of the best edit so far from which on another source is worth refining."""
_MOST_STEPS = 5
"""Steps from neighbour to neighbour."""
_FOLLOWED = 4
"""Neighbours that are measured on all queries, in each step."""


@dataclass(frozen=True)
class Scored:
    """A candidate and its figures; those of weak ones are taken over the first queries only."""

    candidate: Candidate
    score: EditScore


@dataclass(frozen=True)
class Baseline:
    """What the chosen edit is compared with: a name and its figures."""

    name: str
    score: EditScore


@dataclass(frozen=True)
class Selection:
    """What was chosen, and everything that was tried: the most queries first, then the greatest gain."""

    chosen: Scored
    tried: tuple[Scored, ...]
    n_queries: int
    budget: float

    @property
    def pareto(self) -> list[Scored]:
        """Those that gain, were measured on all queries and are beaten by no other one in both KL and gain,
        least KL first."""
        measured = [one for one in self.tried if one.score.kl is not None and one.score.gain > 0]
        front: list[Scored] = []
        for scored in sorted(measured, key=lambda one: (one.score.kl or 0.0, -one.score.gain)):
            if not front or scored.score.gain > front[-1].score.gain:
                front.append(scored)
        return front

    def choose(self, row: int) -> Selection:
        """The same with row `row` of `pareto`, counted from 1, as the chosen one. Raises `NoGainError`."""
        front = self.pareto
        if not 1 <= row <= len(front):
            raise NoGainError(f"there is no row {row} to choose; the table has rows 1 to {len(front)}")
        return replace(self, chosen=front[row - 1])


def ranked(tried: Iterable[Scored]) -> tuple[Scored, ...]:
    """What was measured on most queries first, then by the gain, the greatest first."""
    return tuple(sorted(tried, key=lambda one: (-len(one.score.gains), -one.score.gain)))


@dataclass
class Search:
    """Looks for the candidate of the greatest gain within the budget.

    Attributes:
        scorer: measures an edit.
        edits_of: makes the edits of a candidate.
        scopes: the time steps that are edited, and others that are tried in their place on the best edit.
        budget: nat per token.
        known: figures of candidates that an earlier search measured; new ones are added. They spare
            measurements and change nothing else.
        advance: told of each comparison, with 1.
    """

    scorer: Scorer
    edits_of: Callable[[Candidate], Edits]
    scopes: tuple[Scope, ...] = (GENERATION,)
    budget: float = DEFAULT_BUDGET
    known: MutableMapping[Candidate, EditScore] = field(default_factory=dict)
    advance: Callable[[int], None] = lambda _: None
    _tried: dict[Candidate, EditScore] = field(default_factory=dict)
    """With as many queries as this search has asked for: `known` may hold more."""

    def run(self, sources: Sequence[Source], layers: tuple[int, ...]) -> Selection:
        """Choose among `sources`, and among `layers` and spans of them.

        Raises:
            NoGainError: nothing gains within the budget, with the figures of what came closest.
        """
        n_all = self.scorer.n_queries
        first = first_candidates(sources, layers, self.scopes[0])
        left = [candidate for candidate in first if self.edits_of(candidate)]
        for n_queries, most in ROUNDS:
            left = _of_several_sources(self._best(left, self.scorer.n_first_queries_with(n_queries)), most)
        left = self._best(left, n_all)
        best: Scored | None = None
        for start in self._starts(left):
            if best is None or start.score.gain > _PROMISING * best.score.gain:
                climbed = self._climb(start, layers)
                best = climbed if best is None or climbed.score.gain > best.score.gain else best
        if best is None:
            raise self._no_gain()
        elsewhere = self._in_other_scope(best)
        if elsewhere is not best:
            best = self._climb(elsewhere, layers)
        tried = ranked(Scored(candidate, score) for candidate, score in self._tried.items())
        return Selection(best, tried, n_all, self.budget)

    def _starts(self, ranked: Sequence[Candidate]) -> list[Scored]:
        """The best affordable candidate of each source, of the best few of those."""
        of_source = {
            source: [candidate for candidate in ranked if candidate.source == source]
            for source in dict.fromkeys(candidate.source for candidate in ranked)
        }
        found = [self._affordable(candidates) for candidates in of_source.values()]
        return [scored for scored in found if scored is not None][:_STARTS]

    def _climb(self, start: Scored, layers: tuple[int, ...]) -> Scored:
        """Go from neighbour to neighbour while one is better."""
        best = start
        for _ in range(_MOST_STEPS):
            former, best = best, self._step(best, layers)
            if best is former:
                break
        return best

    def _in_other_scope(self, best: Scored) -> Scored:
        """Return the best edit in another scope, if it gains more there by the lower confidence bound.

        A scope decides where in an answer an edit gains: of a whole answer, one query whose answer is a long
        set phrase can outweigh ten others, and the mean is that of one query.
        """
        others = [
            replace(best.candidate, scope=scope) for scope in self.scopes if scope != best.candidate.scope
        ]
        for candidate in others:
            self._measured(candidate, self.scorer.n_queries)
            score = self._with_divergence(candidate)
            if self._is_affordable(score) and score.lower_bound > best.score.lower_bound:
                best = Scored(candidate, score)
        return best

    def _step(self, best: Scored, layers: tuple[int, ...]) -> Scored:
        """The best neighbour, if it is better; more and more queries are asked of fewer and fewer."""
        near = [
            one for one in neighbours(best.candidate, layers) if one not in self._tried and self.edits_of(one)
        ]
        for n_queries, _ in ROUNDS:
            n_queries = self.scorer.n_first_queries_with(n_queries)
            former = self._edit_score(best.score.gains[:n_queries], None).gain
            near = [one for one in self._best(near, n_queries) if self._tried[one].gain > former][:_FOLLOWED]
        return self._affordable(self._best(near, self.scorer.n_queries), best) or best

    def _best(self, candidates: Iterable[Candidate], n_queries: int) -> list[Candidate]:
        """The candidates by their gain over the first queries, the greatest first."""
        measured = [(one, self._measured(one, n_queries).gain) for one in candidates]
        return [one for one, _ in sorted(measured, key=lambda each: -each[1])]

    def _measured(self, candidate: Candidate, n_queries: int) -> EditScore:
        """The figures over the first queries."""
        known = self.known.get(candidate)
        gains = list(known.gains) if known is not None else []
        if len(gains) < n_queries:
            gains += self.scorer.gains(
                self.edits_of(candidate), range(len(gains), n_queries), scope=candidate.scope
            )
            self.known[candidate] = self._edit_score(gains, None if known is None else known.kl)
        self._tried[candidate] = self._edit_score(gains[:n_queries], None)
        self.advance(1)
        return self._tried[candidate]

    def _affordable(self, ranked: Sequence[Candidate], former: Scored | None = None) -> Scored | None:
        """The first that gains within the budget, if it gains more than a former one; else that."""
        floor = 0.0 if former is None else former.score.gain
        for candidate in ranked:
            if self._tried[candidate].gain <= floor:
                break
            score = self._with_divergence(candidate)
            if self._is_affordable(score):
                return Scored(candidate, score)
        return former

    def _is_affordable(self, score: EditScore) -> bool:
        """Whether the divergence was measured and is within the budget."""
        return score.kl is not None and score.kl <= self.budget

    def _with_divergence(self, candidate: Candidate) -> EditScore:
        known = self.known[candidate]
        if known.kl is None:
            kl = self.scorer.divergence(self.edits_of(candidate), scope=candidate.scope)
            known = replace(known, kl=kl)
            self.known[candidate] = known
        self._tried[candidate] = replace(self._tried[candidate], kl=known.kl)
        return self._tried[candidate]

    def _edit_score(self, gains: Sequence[float], kl: float | None) -> EditScore:
        return EditScore(tuple(gains), self.scorer.declined[: len(gains)], kl)

    def _no_gain(self) -> NoGainError:
        if not self._tried:
            return NoGainError("no direction was found; give more queries, or try a larger model")
        most = max(len(score.gains) for score in self._tried.values())
        best, score = max(
            ((one, found) for one, found in self._tried.items() if len(found.gains) == most),
            key=lambda each: each[1].gain,
        )
        cost = "" if score.kl is None else f" at {score.kl:.3g} nat per token"
        return NoGainError(
            f"nothing brings this model nearer to the safety-first persona within {self.budget:g} nat per "
            f"token: the best of {len(self._tried)} edits, {best}, gains {score.gain:+.3f} +- "
            f"{score.standard_error:.3f} nat an answer{cost}; give more queries, raise --kl-budget, or try "
            "a larger model"
        )


def _of_several_sources(ranked: Sequence[Candidate], most: int) -> list[Candidate]:
    """The first candidates, of one source no more than a third of all."""
    counts: Counter[Source] = Counter()
    chosen: list[Candidate] = []
    for candidate in ranked:
        if counts[candidate.source] < max(2, most // 3) and len(chosen) < most:
            counts[candidate.source] += 1
            chosen.append(candidate)
    return chosen


def random_edits(like: Edits, seed: int) -> dict[int, LayerEdit]:
    """Edits in random directions with the ranks and the lengths of `like`."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    def as_long_as(vector: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        if vector is None:
            return None
        direction = normal(vector.shape)
        length = np.linalg.norm(vector.astype(np.float64))
        return direction * np.float32(length / np.linalg.norm(direction))

    def random(edit: LayerEdit) -> LayerEdit:
        remove = None if edit.remove is None else orthonormal_rows(normal(edit.remove.shape))
        return LayerEdit(as_long_as(edit.add), remove, edit.gain, as_long_as(edit.bias))

    return {layer: random(edit) for layer, edit in sorted(like.items())}
