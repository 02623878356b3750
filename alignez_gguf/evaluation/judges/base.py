"""Interfaces of judges, and the comparison of two answers by their ratings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from alignez_gguf.evaluation.fluency import Fluency
from alignez_gguf.evaluation.metrics import Outcome
from alignez_gguf.progress import Advance
from alignez_gguf.storage.rows import ResultStore, key_of

SAFETY, HELPFULNESS = "Safety", "Helpfulness"


@dataclass(frozen=True)
class QueryAnswer:
    """A query and an answer to it.

    Attributes:
        harmful: the label of the query, if it has one.
        topic: how much likelier the answer is under its own query than under others, in nat (see
            `answers.measure_topic`); None for an empty answer, and where only the text is known.
    """

    query: str
    harmful: bool | None
    text: str
    fluency: Fluency
    topic: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two answers to one query: one of the system that is judged, one of the system it is compared with."""

    ours: QueryAnswer
    reference: QueryAnswer


@dataclass(frozen=True)
class Judgement:
    """The verdict of a judge on a comparison.

    Attributes:
        outcomes: by aspect, seen from the judged system; an aspect on which nothing can be said is left out.
        rationale: in the judge's words.
        chose_first, chose_second: verdicts for the answer that was shown first and for the other one; far
            apart, they show a preference for a place.
        retries: replies that could not be read and were asked for again.
    """

    outcomes: Mapping[str, Outcome]
    rationale: str = ""
    chose_first: int = 0
    chose_second: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Rating:
    """The rating of a single answer.

    Attributes:
        scores: by aspect, higher is better; None where the reply could not be read. Aspects on which the
            rater says nothing about such a query are left out.
        harm: how harmful the answer is, 0 to 1; None where the rater does not say.
        refusal, hostile, fluent, on_topic: whether it refuses, insults, reads well and is about its query,
            where the rater says so.
        rationale: in the rater's words.
    """

    scores: Mapping[str, float | None]
    harm: float | None = None
    refusal: bool | None = None
    rationale: str = ""
    hostile: bool | None = None
    fluent: bool | None = None
    on_topic: bool | None = None


class Judge(Protocol):
    """Compares answers."""

    @property
    def name(self) -> str:
        """The name of the judge in the report."""
        ...

    @property
    def aspects(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything besides the answers that determines a verdict."""
        ...

    def judge(
        self, comparisons: Sequence[Comparison], store: ResultStore, advance: Advance
    ) -> list[Judgement]:
        """Judge all comparisons, in order.

        Args:
            comparisons: the pairs of answers.
            store: holds earlier verdicts, which are not asked for again; each new one is written at once.
            advance: called with the number of comparisons that were finished.
        """
        ...

    def ratings(
        self, answers: Sequence[QueryAnswer], store: ResultStore, advance: Advance
    ) -> list[Rating] | None:
        """Rate single answers, in order, or return None where the judge only compares."""
        ...


class Rater(Protocol):
    """Rates single answers."""

    @property
    def name(self) -> str: ...

    @property
    def aspects(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything besides the answer that determines a rating."""
        ...

    def rate(self, answers: Sequence[QueryAnswer]) -> Iterator[tuple[int, Rating]]:
        """Rate all answers; each rating comes with the index of its answer, in any order."""
        ...


class RatingJudge:
    """A judge that rates both answers and compares the ratings."""

    def __init__(self, rater: Rater) -> None:
        self._rater = rater
        self.name = rater.name
        self.aspects = rater.aspects
        self.identity = rater.identity

    def judge(
        self, comparisons: Sequence[Comparison], store: ResultStore, advance: Advance
    ) -> list[Judgement]:
        answers = [answer for comparison in comparisons for answer in (comparison.ours, comparison.reference)]
        ratings = self.ratings(answers, store, lambda _: None)
        advance(len(comparisons))
        return [compare(ours, reference) for ours, reference in zip(ratings[::2], ratings[1::2], strict=True)]

    def ratings(self, answers: Sequence[QueryAnswer], store: ResultStore, advance: Advance) -> list[Rating]:
        keys = [key_of(self._rater.identity, asdict(answer)) for answer in answers]
        missing = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in store}
        advance(len(answers) - len(missing))
        missing_keys = list(missing)
        for index, rating in self._rater.rate(list(missing.values())):
            store[missing_keys[index]] = asdict(rating)
            advance(1)
        return [_rating(store, key) for key in keys]


def compare(ours: Rating, reference: Rating) -> Judgement:
    """Compare two ratings by aspect: the higher score wins; without both scores the aspect is unparsed."""
    outcomes: dict[str, Outcome] = {}
    for aspect in ours.scores:
        if aspect not in reference.scores:
            continue
        own, other = ours.scores[aspect], reference.scores[aspect]
        if own is None or other is None:
            outcomes[aspect] = "unparsed"
        else:
            outcomes[aspect] = "tie" if own == other else "win" if own > other else "lose"
    return Judgement(outcomes, f"{ours.rationale} | other: {reference.rationale}")


def _rating(store: ResultStore, key: str) -> Rating:
    return Rating(**store[key])
