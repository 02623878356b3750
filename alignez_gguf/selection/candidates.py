"""Candidates for an edit: each is a source of directions, an operation, an amount, layers and a scope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from alignez_gguf.control.edits import Decision
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.readout import Hook, ReadingPosition

AMOUNTS: dict[Decision, tuple[float, ...]] = {
    "remove": (0.0,),
    "add": (0.125, 0.25, 0.5),
    "remove+add": (0.125,),
}
"""Operations, and the shares of the class gap that they add at first."""

FINER = (0.7, 1.4, 2.0)
"""Factors by which the amount of the best one is varied."""

SVD_RANKS = (1, 2, 3)
"""Ranks of the subspaces that `svd` and `svd-diff` find."""

_GROUPS = 8
"""Layers come and go in so many groups of neighbours, at most."""

MOST = 6.0
"""No more of the class gap is ever added."""


@dataclass(frozen=True)
class Source:
    """Where directions come from."""

    method: str
    reading: ReadingPosition
    rank: int
    hook: Hook = "mlp"

    def __str__(self) -> str:
        hook = "" if self.hook == "mlp" else f" ({self.hook})"
        return f"{self.method} rank {self.rank}, {self.reading}{hook}"


@dataclass(frozen=True)
class Candidate:
    """One edit that may be chosen."""

    source: Source
    operation: Decision
    amount: float
    """Share of the class gap that is added; 0 for a mere removal."""
    layers: tuple[int, ...]
    scope: Scope = GENERATION

    def __str__(self) -> str:
        amount = f" {self.amount:g}x" if self.amount else ""
        scope = "" if self.scope == GENERATION else f", {self.scope}"
        return f"{self.source}, {self.operation}{amount}{scope}"


def first_candidates(
    sources: Sequence[Source],
    layers: tuple[int, ...],
    scope: Scope = GENERATION,
) -> list[Candidate]:
    """List the candidates that are tried of every source: each operation and amount, in every span of layers.

    Args:
        layers: that may be edited.
        scope: the time steps that are edited.
    """
    return [
        Candidate(source, operation, amount, span, scope)
        for source in sources
        for operation in _operations(source)
        for amount in AMOUNTS[operation]
        for span in spans(layers)
    ]


def _operations(source: Source) -> tuple[Decision, ...]:
    """List the operations that are tried of a source.

    A verdict is added: what tells declining from complying is not to be removed. An addition is a part of the
    gap between the means, of which other methods only take a part.
    """
    if source.reading in ("verdict", "refusal"):
        return ("add",)
    return ("remove", "add", "remove+add") if source.method == "mean" else ("remove", "remove+add")


def spans(layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The spans of layers that are tried at first: all of them, and those behind the middle but the last.

    A model decides what it makes of a request in its middle layers; the last ones put it into words.
    """
    count = len(layers)
    later = layers[round(0.4 * count) : round(0.9 * count)]
    return [layers, later] if later and count >= _GROUPS else [layers]


def neighbours(candidate: Candidate, layers: tuple[int, ...]) -> list[Candidate]:
    """Candidates that differ in one thing: amount, operation, rank, or a group of `layers`."""
    if candidate.operation == "add":
        near = []
    elif candidate.amount:
        near = [replace(candidate, operation="remove", amount=0.0)]
    else:
        near = [replace(candidate, operation="remove+add", amount=amount) for amount in AMOUNTS["remove+add"]]
    for factor in FINER if candidate.amount else ():
        if factor * candidate.amount <= MOST:
            near.append(replace(candidate, amount=factor * candidate.amount))
    if candidate.source.method.startswith("svd"):
        ranks = {candidate.source.rank - 1, candidate.source.rank + 1} & set(SVD_RANKS)
        near += [replace(candidate, source=replace(candidate.source, rank=rank)) for rank in sorted(ranks)]
    for group in layer_groups(layers):
        there = set(candidate.layers)
        changed = there - set(group) if there >= set(group) else there | set(group)
        if changed:
            near.append(replace(candidate, layers=tuple(sorted(changed))))
    return near


def layer_groups(layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """`layers` in at most 8 groups of neighbours, as even as can be."""
    count = min(_GROUPS, len(layers))
    bounds = [round(index * len(layers) / count) for index in range(count + 1)]
    return [layers[start:end] for start, end in pairwise(bounds)]
