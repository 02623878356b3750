"""Which queries the safety-first persona declines, and which queries look alike. Nothing here is labelled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.errors import QueryError
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline.greedy import greedy_answers
from alignez_gguf.pipeline.job import Job
from alignez_gguf.selection.scoring import ANSWER_TOKENS
from alignez_gguf.text.refusal import is_refusal

MIN_VERDICTS = 6
"""Queries of each kind from which on directions are fitted to verdicts."""

_MIN_QUERIES = (8, 6, 6)
"""To fit on, to choose on and to confirm on."""
_SHARES = (0.5, 0.25, 0.25)
_MOST_CHOSEN = 40
"""Queries to choose on, and to confirm on, at most: each costs the tokens of an answer per edit."""


def declines(pair: PreferencePair) -> bool:
    """Whether the safety-first persona declines the query of a pair."""
    return is_refusal(pair.helpful, pair.query)


QueryContrast = list[tuple[str, str]]
"""Queries of one kind, each with one of another kind."""


def persona_contrast(pairs: Sequence[PreferencePair]) -> QueryContrast:
    """Queries that the safety-first persona declines, each with one that it answers."""
    return _matched(*_by_verdict(pairs))


def own_contrast(job: Job, pairs: Sequence[PreferencePair]) -> QueryContrast:
    """Queries that the model declines by itself, each with one that it complies with.

    Of what the safety-first persona declines, so that both kinds are harmful and only the decision differs.
    """
    own = own_verdicts(job, declined(pairs))
    return _matched(
        [query for query, declines in own.items() if declines],
        [query for query, declines in own.items() if not declines],
    )


def declined(pairs: Sequence[PreferencePair]) -> list[str]:
    """The queries that the safety-first persona declines, by their first sample."""
    return _by_verdict(pairs)[0]


def own_verdicts(job: Job, queries: Sequence[str]) -> dict[str, bool]:
    """Whether the model itself declines each query, in a greedy answer; kept."""
    if not queries:
        return {}

    def answer() -> list[str]:
        prompts = list(map(job.templates.plain_prompt, queries))
        return greedy_answers(
            job, job.engine, prompts, "asking what the model declines by itself", ANSWER_TOKENS
        )

    texts = job.work.cached_json(
        "own-answers", answer, model=job.engine.info, templates=job.templates, queries=list(queries)
    )
    return {query: is_refusal(text, query) for text, query in zip(texts, queries, strict=True)}


def split(
    pairs: Sequence[PreferencePair], seed: int
) -> tuple[list[PreferencePair], list[PreferencePair], list[PreferencePair]]:
    """The pairs to fit on, and one pair per query to choose on and to confirm on.

    Queries that look most alike, such as a harmful one and its harmless twin, stay together: what is learnt
    of one says something of the other.

    Raises:
        QueryError: there are too few.
    """
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    if len(queries) < sum(_MIN_QUERIES):
        raise QueryError(
            f"{len(queries)} usable pairs are too few to fit, to choose and to confirm on; give at least "
            f"{sum(_MIN_QUERIES)} queries that the personas answer differently"
        )
    _, n_choice, n_confirmation = (
        max(least, round(share * len(queries))) for least, share in zip(_MIN_QUERIES, _SHARES, strict=True)
    )
    groups = look_alikes(queries)
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = [queries[index] for group in order for index in groups[group]]
    n_choice, n_confirmation = min(n_choice, _MOST_CHOSEN), min(n_confirmation, _MOST_CHOSEN)
    choice = set(shuffled[:n_choice])
    confirmation = set(shuffled[n_choice : n_choice + n_confirmation])
    held_out = choice | confirmation
    return (
        [pair for pair in pairs if pair.query not in held_out],
        _one_each(pairs, choice),
        _one_each(pairs, confirmation),
    )


def alternating(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Declined queries and answered ones in turns, so that the first few hold both."""
    declined = [pair for pair in pairs if declines(pair)]
    answered = [pair for pair in pairs if not declines(pair)]
    both = [pair for two in zip(declined, answered, strict=False) for pair in two]
    n = min(len(declined), len(answered))
    return [*both, *declined[n:], *answered[n:]]


def _one_each(pairs: Sequence[PreferencePair], queries: set[str]) -> list[PreferencePair]:
    """The first pair of each of these queries, in their order."""
    first = {pair.query: pair for pair in reversed(pairs) if pair.query in queries}
    return list(reversed(first.values()))


def _by_verdict(pairs: Sequence[PreferencePair]) -> tuple[list[str], list[str]]:
    """The queries that the safety-first persona declines, and those that it answers, by the first sample."""
    verdicts = {pair.query: declines(pair) for pair in reversed(pairs)}
    queries = list(reversed(verdicts))
    return [query for query in queries if verdicts[query]], [
        query for query in queries if not verdicts[query]
    ]


def _matched(ours: Sequence[str], theirs: Sequence[str]) -> QueryContrast:
    """Every query of the more frequent kind with one of the other that looks like it.

    What both have in common, their topic, then tells nothing. Those of the rarer kind come again, about
    equally often.
    """
    from scipy.optimize import linear_sum_assignment

    if not ours or not theirs:
        return []
    times = -(-max(len(ours), len(theirs)) // min(len(ours), len(theirs)))
    rows = list(ours) * (times if len(ours) < len(theirs) else 1)
    columns = list(theirs) * (times if len(theirs) < len(ours) else 1)
    likeness = _likeness([*rows, *columns])[: len(rows), len(rows) :]
    matched = zip(*linear_sum_assignment(likeness, maximize=True), strict=True)
    return [(rows[row], columns[column]) for row, column in matched]


def look_alikes(queries: Sequence[str]) -> list[list[int]]:
    """Groups of one query, or of two that look more like each other than like any other one."""
    likeness = _likeness(queries)
    np.fill_diagonal(likeness, -1.0)
    nearest = likeness.argmax(axis=1)
    groups = []
    for index, other in enumerate(nearest.tolist()):
        mutual = nearest[other] == index and likeness[index, other] > 0
        if not mutual:
            groups.append([index])
        elif index < other:
            groups.append([index, other])
    return groups


def _likeness(queries: Sequence[str]) -> NDArray[np.float64]:
    """Cosine of the words of two queries, rare words counting more, [n_queries, n_queries]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern=r"\w+").fit_transform([query or "?" for query in queries])
    return np.asarray((words @ words.T).toarray(), np.float64)
