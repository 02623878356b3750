"""The choice of an edit by its label-free score: cheap measurements first, costly ones where they can matter.

First every source of directions is tried on all layers with a few operations and amounts; then the best get
all amounts; then they are built up again from groups of layers, the most telling ones first; then their
amounts are refined; at last the best one goes from neighbour to neighbour while it gets better. The
divergence, which costs more than all of this, is measured only for what could be chosen. Everything is
deterministic. This module knows nothing of engines.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, groupby, islice

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.candidates import AMOUNTS, FINER, PLACED, PROBES, Candidate, Source, layer_groups
from alignez_gguf.edits import Decision, Edits, LayerEdit
from alignez_gguf.errors import NoGainError
from alignez_gguf.scoring import STEERINGS_TOGETHER, Figures, Limits, Scorer, Steering
from alignez_gguf.significance import beyond_chance

DEFAULT_BUDGET = 0.1
"""Nat per token."""

_FINALISTS = 4
"""Candidates on all layers whose amounts are varied."""

_GROWN = 3
"""Candidates that are built up from groups of layers."""


_MOST = 6.0
"""No more of the class gap is ever added."""


@dataclass(frozen=True)
class Scored:
    """A candidate and its figures.

    The divergence is measured only for those that could be chosen, and only until they no longer can.
    """

    candidate: Candidate
    figures: Figures


@dataclass(frozen=True)
class Baseline:
    """What the chosen edit is compared with: a name and its figures, and KL where it was measured."""

    name: str
    figures: Figures
    kl: float | None


@dataclass(frozen=True)
class Selection:
    """What was chosen, and everything that was tried, the best bound on the net first."""

    chosen: Scored
    tried: tuple[Scored, ...]
    n_queries: int
    budget: float

    @property
    def pareto(self) -> list[Scored]:
        """Those that gain beyond chance, were measured to the end and are beaten by no other one in both KL
        and net, least KL first."""
        measured = [scored for scored in _certain(self.tried) if scored.figures.net is not None]
        front: list[Scored] = []
        for scored in sorted(measured, key=lambda s: (s.figures.kl or 0.0, -(s.figures.net or 0.0))):
            if not front or (scored.figures.net or 0.0) > (front[-1].figures.net or 0.0):
                front.append(scored)
        return front

    def choose(self, row: int) -> Selection:
        """The same with row `row` of `pareto`, counted from 1, as the chosen one. Raises `NoGainError`."""
        front = self.pareto
        if not 1 <= row <= len(front):
            raise NoGainError(f"there is no row {row} to choose; the table has rows 1 to {len(front)}")
        return replace(self, chosen=front[row - 1])


@dataclass
class Search:
    """Looks for the candidate of the greatest net within the budget.

    Attributes:
        scorer: measures an edit.
        edits_of: makes the edits of a candidate.
        budget: nat per token.
        floor: what the net has to exceed for a candidate to be of interest, in nat; no edit has 0.
        can_add: whether the class gap of a source can be added; otherwise it is only removed from.
        advance: called after every measurement, with a line about it.
        known: figures of candidates that an earlier search measured; new ones are added. They spare
            measurements and change nothing else.
        shared: `first_tokens` of a search under another scope that steers the first token alike.
    """

    scorer: Scorer
    edits_of: Callable[[Candidate], Edits]
    budget: float = DEFAULT_BUDGET
    floor: float = 0.0
    can_add: Callable[[Source], bool] = lambda _: True
    advance: Callable[[str], None] = lambda _: None
    known: MutableMapping[Candidate, Figures] = field(default_factory=dict)
    shared: Mapping[Candidate, Figures] = field(default_factory=dict)
    _tried: dict[Candidate, Figures] = field(default_factory=dict)
    """In the order in which they were tried, with what this search has asked for: `known` may hold more."""

    @property
    def first_tokens(self) -> dict[Candidate, Figures]:
        """What was tried, with what the first tokens say of it."""
        return {candidate: _first_token(figures) for candidate, figures in self._tried.items()}

    def run(self, sources: Sequence[Source], layers: tuple[int, ...]) -> Selection | None:
        """Choose among `sources`, and among `layers` and parts of them.

        Nothing where nothing affordable gains beyond chance; `no_gain` says why.
        """
        self._try(self._all_amounts(sources, PROBES, layers))
        finalists = [scored.candidate.source for scored in self._finalists(_FINALISTS)]
        self._try(self._all_amounts(dict.fromkeys(finalists), AMOUNTS, layers))
        for finalist in self._finalists(_GROWN):
            self._grow(finalist.candidate)
        for finalist in self._finalists(_GROWN):
            self._place(finalist.candidate)
        finest = [scored.candidate for scored in self._finalists(_FINALISTS)]
        self._try(replace(one, amount=factor * one.amount) for one in finest for factor in FINER)
        chosen = self._climb(layer_groups(layers))
        if chosen is None:
            return None
        self._measure_gentler(chosen.candidate)
        return Selection(chosen, tuple(self._ranked()), self.scorer.n_queries, self.budget)

    def no_gain(self) -> NoGainError:
        """The error of a search that found nothing, with the figures of what came closest."""
        return NoGainError(
            "nothing makes this model safer for certain and by more than its answers lose, within "
            f"{self.budget:g} nat per token ({self._best()}); give more queries, raise --kl-budget, or "
            "try a larger model"
        )

    def _try(self, candidates: Iterable[Candidate]) -> None:
        """Measure the first tokens of candidates, several together; rounding depends on which."""
        steered = self._steered(candidate for candidate in candidates if candidate not in self._tried)
        while together := list(islice(steered, STEERINGS_TOGETHER)):
            # Not fewer of them where some are known, from a search that was interrupted.
            asked = [
                (candidate, steering) for candidate, steering in together if candidate not in self.shared
            ]
            if any(candidate not in self.known for candidate, _ in asked):
                found = self.scorer.first_tokens([steering for _, steering in asked])
                for (candidate, _), figures in zip(asked, found, strict=True):
                    self.known.setdefault(candidate, figures)
            for candidate, _ in together:
                self._tried[candidate] = _first_token(self.shared.get(candidate) or self.known[candidate])
                self.advance(str(candidate))

    def _all_amounts(
        self,
        sources: Iterable[Source],
        amounts_of: dict[Decision, tuple[float, ...]],
        layers: tuple[int, ...],
    ) -> list[Candidate]:
        return [
            Candidate(source, operation, amount, layers)
            for source in sources
            for operation, amounts in amounts_of.items()
            if operation == "remove" or self.can_add(source)
            for amount in amounts
        ]

    def _steered(self, candidates: Iterable[Candidate]) -> Iterator[tuple[Candidate, Steering]]:
        """What candidates do, but for those that do nothing; of ones that add, only the strength differs."""
        for unit, group in groupby(candidates, key=_at_strength_one):
            if edits := self.edits_of(unit):
                for candidate in group:
                    yield candidate, Steering(edits, candidate.amount if unit.operation == "add" else 1.0)

    def _grow(self, candidate: Candidate) -> None:
        """Take in the group of layers that raises the bound most, again and again while one does."""
        groups = layer_groups(candidate.layers)
        layers: tuple[int, ...] = ()
        bound = -np.inf
        while groups:
            grown = [replace(candidate, layers=tuple(sorted(layers + group))) for group in groups]
            self._try(grown)
            bounds = [self._tried[one].bound if one in self._tried else -np.inf for one in grown]
            best = int(np.argmax(bounds))
            if bounds[best] <= bound:
                break
            bound, layers = bounds[best], grown[best].layers
            del groups[best]

    def _place(self, candidate: Candidate) -> None:
        """Let groups of layers take an addition beside the removal, one after the other while that helps."""
        if candidate.operation == "add" or not self.can_add(candidate.source):
            return
        bare = _bare(candidate)
        self._try([bare])
        groups = layer_groups(candidate.layers)
        added: tuple[int, ...] = ()
        bound = self._tried[bare].bound
        while groups:
            placed = [
                replace(bare, operation="remove+add", amount=amount, added=tuple(sorted(added + group)))
                for group in groups
                for amount in PLACED
            ]
            self._try(placed)
            bounds = [self._tried[one].bound if one in self._tried else -np.inf for one in placed]
            best = int(np.argmax(bounds))
            if bounds[best] <= bound:
                break
            bound, added = bounds[best], placed[best].added or ()
            del groups[best // len(PLACED)]

    def _climb(self, groups: Sequence[tuple[int, ...]]) -> Scored | None:
        """Go from the best affordable candidate to its neighbours while one of them is better.

        What the layers cost plays no part while they grow; here it does.
        """
        best: Scored | None = None
        while True:
            former, best = best, next(iter(self._affordable(1)), None)
            if best is None or best == former:
                return best
            self._try(_neighbours(best.candidate, groups))

    def _finalists(self, count: int) -> list[Scored]:
        """The best affordable ones, then the best others: fewer layers may cost less, or gain more."""
        affordable = self._affordable(count)
        others = [
            scored
            for scored in self._ranked()
            if scored not in affordable and not self._has_costly_part(scored.candidate)
        ]
        return [*affordable, *others][:count]

    def _ranked(self) -> list[Scored]:
        scored = [Scored(candidate, figures) for candidate, figures in self._tried.items()]
        return sorted(scored, key=lambda one: -one.figures.bound)

    def _affordable(self, count: int) -> list[Scored]:
        """The `count` best candidates that gain beyond chance within the budget, best net first.

        Measures the divergence of only as many as it takes, and only as far: none below the net of the last
        of them, or below the floor, and none that does more of what is too much already.
        """
        candidates = _certain(self._ranked())
        found = [scored for scored in candidates if self._pays(scored)]
        nets = sorted(scored.figures.net or 0.0 for scored in found)
        for scored in candidates:
            figures = scored.figures
            least = nets[-count] if len(nets) >= count else self.floor
            if figures.bound <= least:
                break
            if figures.net is not None:
                continue
            if figures.divergence is None and self._has_costly_part(scored.candidate):
                continue
            measured = self._measured(scored, figures.bound - least)
            if self._pays(measured):
                found.append(measured)
                insort(nets, measured.figures.net or 0.0)
        return sorted(found, key=lambda one: (-(one.figures.net or 0.0), one.figures.kl or 0.0))[:count]

    def _pays(self, scored: Scored) -> bool:
        """Whether it is known to be within the budget and above the floor."""
        kl, net = scored.figures.kl, scored.figures.net
        return kl is not None and net is not None and kl <= self.budget and net > self.floor

    def _has_costly_part(self, candidate: Candidate) -> bool:
        """Whether a part of what this candidate does was measured and is over the budget."""
        return any(
            figures.divergence is not None
            and figures.divergence.per_token > self.budget
            and other != candidate
            and (other.source, other.operation) == (candidate.source, candidate.operation)
            and other.amount <= candidate.amount
            and set(other.layers) <= set(candidate.layers)
            and set(_adding(other)) <= set(_adding(candidate))
            for other, figures in self._tried.items()
        )

    def _measure_gentler(self, chosen: Candidate) -> None:
        """Measure smaller amounts of the chosen edit too, so that there is something to choose from."""
        for scored in self._ranked():
            candidate = scored.candidate
            same = (candidate.source, candidate.layers, candidate.added) == (
                chosen.source,
                chosen.layers,
                chosen.added,
            )
            if same and candidate.amount <= chosen.amount and scored.figures.gain > 0:
                self._measured(scored)

    def _best(self) -> str:
        """What the greatest gain was, and what it would cost."""
        if not self._tried:
            return "no direction was found"
        best = self._ranked()[0]
        figures = best.figures
        if figures.divergence is not None and figures.net is None:
            figures = self.scorer.score(self.edits_of(best.candidate))
        cost = "" if figures.kl is None else f" at {figures.kl:.3g} nat per token, net {figures.net:+.3f}"
        return (
            f"the best of {len(self._tried)} edits, {best.candidate}, gains {figures.gain:+.3f} "
            f"+- {figures.standard_error:.3f}{cost}"
        )

    def _measured(self, scored: Scored, after_first: float = math.inf) -> Scored:
        """With the divergence, measured until it exceeds the budget, or this much after the first tokens."""
        limits = Limits(self.budget, after_first)
        candidate, divergence = scored.candidate, scored.figures.divergence
        if divergence is not None and divergence.suffices_for(limits):
            return scored
        known = self.known.get(candidate, scored.figures).divergence
        divergence = None if known is None else known.within(limits)
        if divergence is None or not divergence.suffices_for(limits):
            divergence = self.scorer.divergence(self.edits_of(candidate), limits)
            self.known[candidate] = replace(scored.figures, divergence=divergence)
        figures = replace(scored.figures, divergence=divergence)
        self._tried[candidate] = figures
        self.advance(str(candidate))
        return replace(scored, figures=figures)


def _certain(tried: Sequence[Scored]) -> list[Scored]:
    """Those of all that were tried that gain beyond chance, in their order."""
    if not tried:
        return []
    return list(compress(tried, beyond_chance(np.array([scored.figures.gains for scored in tried]))))


def _first_token(figures: Figures) -> Figures:
    return replace(figures, divergence=None)


def random_edits(like: Edits, seed: int) -> dict[int, LayerEdit]:
    """Edits in random directions with the ranks and the lengths of `like`."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    def random(edit: LayerEdit) -> LayerEdit:
        remove = None if edit.remove is None else normal(edit.remove.shape)
        if edit.add is None:
            return LayerEdit(remove=remove)
        direction = normal(edit.add.shape)
        return LayerEdit(add=direction * np.float32(edit.scale / np.linalg.norm(direction)), remove=remove)

    return {layer: random(edit) for layer, edit in sorted(like.items())}


def _neighbours(candidate: Candidate, groups: Sequence[tuple[int, ...]]) -> list[Candidate]:
    """Candidates that differ in a step of the amount, in a group of layers, or in both.

    Both, since fewer layers that take more can cost as much.
    """
    amounts = [factor * candidate.amount for factor in (1.0, *FINER)] if candidate.amount else [0.0]
    amounts = [amount for amount in amounts if amount <= _MOST]
    found = [replace(candidate, amount=amount) for amount in amounts]
    for group in groups:
        layers = tuple(sorted(set(candidate.layers) ^ set(group)))
        if layers and candidate.added is None:
            found += [replace(candidate, layers=layers, amount=amount) for amount in amounts]
        elif candidate.added is not None:
            added = tuple(sorted(set(candidate.added) ^ (set(group) & set(candidate.layers))))
            found.append(replace(candidate, added=added) if added else _bare(candidate))
    return found


def _bare(candidate: Candidate) -> Candidate:
    """The mere removal of what a candidate removes."""
    return replace(candidate, operation="remove", amount=0.0, added=None)


def _at_strength_one(candidate: Candidate) -> Candidate:
    """The candidate whose edits, at the strength `amount`, are those of one that only adds."""
    return replace(candidate, amount=1.0) if candidate.operation == "add" else candidate


def _adding(candidate: Candidate) -> tuple[int, ...]:
    return candidate.layers if candidate.added is None else candidate.added
