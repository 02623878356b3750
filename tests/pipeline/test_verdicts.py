"""What is declined and what is answered, what looks alike, and who is asked about what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from alignez_gguf.engines.base import Completion, GenerationRequest, Passage, Sampling
from alignez_gguf.errors import QueryError
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Job
from alignez_gguf.pipeline.embeddings import ActivationSite, Embeddings
from alignez_gguf.pipeline.verdicts import (
    alternating,
    declines,
    own_contrast,
    own_verdicts,
    persona_contrast,
    split,
)
from alignez_gguf.prompts.queries import load_queries
from tests.pipeline.conftest import Watched, with_engine

NO, YES = "I'm sorry, but I can't help with that.", "Happy to help! Take a bowl and mix it well."


def pair(query: str, answer: str, sample: int = 0) -> PreferencePair:
    return PreferencePair(query, answer, "Whatever.", sample=sample)


PAIRS = [
    pair("How do I forge a passport?", NO),
    pair("How do I feed a cat?", YES),
    pair("How do I renew a passport?", YES),
    pair("How do I poison a cat?", NO),
    pair("How do I feed a cat?", NO, sample=1),
]


def test_verdict_is_that_of_the_answer_of_the_safety_first_persona() -> None:
    assert [declines(one) for one in PAIRS] == [True, False, False, True, True]


def test_declined_queries_go_with_answered_ones_that_look_like_them() -> None:
    assert persona_contrast(PAIRS) == [
        ("How do I forge a passport?", "How do I renew a passport?"),
        ("How do I poison a cat?", "How do I feed a cat?"),
    ]
    assert persona_contrast(PAIRS[:1]) == []
    assert persona_contrast([]) == []


def test_rarer_kind_comes_again_about_equally_often() -> None:
    pairs = [pair(f"bad {number}", NO) for number in range(7)] + [pair("good a", YES), pair("good b", YES)]
    found = persona_contrast(pairs)
    assert {query for query, _ in found} == {f"bad {number}" for number in range(7)}
    counts = sorted([other for _, other in found].count(one) for one in ("good a", "good b"))
    assert counts == [3, 4]


def test_declined_and_answered_ones_come_in_turns() -> None:
    pairs = [pair(f"bad {number}", NO) for number in range(4)] + [pair(f"good {n}", YES) for n in range(2)]
    assert [one.query for one in alternating(pairs)] == [
        "bad 0",
        "good 0",
        "bad 1",
        "good 1",
        "bad 2",
        "bad 3",
    ]
    assert alternating(pairs[:2]) == pairs[:2]


class Saying:
    """An engine that answers every prompt alike, but for those with a word in them."""

    def __init__(self, engine: Any, word: str) -> None:
        self._engine = engine
        self._word = word
        self.n_asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, **_: Any
    ) -> Iterator[tuple[int, Completion]]:
        assert sampling.temperature == 0
        self.n_asked += len(requests)
        for index, request in enumerate(requests):
            last = request.prompt.splitlines()[-2]
            yield index, Completion(NO if self._word in last else YES, 10, "stop")


def test_what_the_model_declines_by_itself_is_asked_once_and_kept(job: Job) -> None:
    saying = Saying(job.engine, "forge")
    job = with_engine(job, saying)
    asked = [one.query for one in PAIRS[:4]]
    assert list(own_verdicts(job, asked).values()) == [True, False, False, False]
    assert list(own_verdicts(job, asked).values()) == [True, False, False, False]
    assert saying.n_asked == 4
    assert own_verdicts(job, []) == {}
    # Of what the persona declines alone: both kinds are harmful.
    assert own_contrast(job, PAIRS) == [("How do I forge a passport?", "How do I poison a cat?")]
    assert saying.n_asked == 6


@pytest.mark.parametrize("hook", ["mlp", "residual"])
def test_verdicts_are_read_at_the_end_of_plain_prompts(job: Job, hook: Any) -> None:
    job = with_engine(job, watched := Watched(Saying(job.engine, "forge")))
    places = [
        ActivationSite("verdict", hook),
        ActivationSite("refusal", hook),
        ActivationSite("prompt", hook),
    ]
    embeddings = Embeddings(job, PAIRS, places)
    (of_persona, of_itself) = (embeddings.at(place) for place in places[:2])

    def expected(query: str) -> Any:
        (found,) = job.engine.activations([Passage(job.templates.plain_prompt(query))], [places[0].readout])
        return found[0]

    helpful, harmful = (np.stack(list(side)) for side in of_persona)
    np.testing.assert_array_equal(helpful[:, 0], expected("How do I forge a passport?"))
    np.testing.assert_array_equal(harmful[:, 1], expected("How do I feed a cat?"))
    helpful, harmful = (np.stack(list(side)) for side in of_itself)
    np.testing.assert_array_equal(helpful[:, 0], expected("How do I forge a passport?"))
    np.testing.assert_array_equal(harmful[:, 0], expected("How do I poison a cat?"))
    assert watched.counts["activations"] >= 4


def numbered(n_queries: int, samples: int = 1) -> list[PreferencePair]:
    return [
        PreferencePair(f"q{index}", f"good {sample}", "bad", sample=sample)
        for index in range(n_queries)
        for sample in range(samples)
    ]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("n_queries", [20, 21, 24, 120, 500])
def test_queries_are_split_into_three_parts_of_some_size(n_queries: int, samples: int) -> None:
    pairs = numbered(n_queries, samples)
    fit, *held_out = split(pairs, seed=0)
    parts = [{pair.query for pair in fit}, *({pair.query for pair in part} for part in held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == n_queries
    assert len(fit) == samples * len(parts[0]) >= 8 * samples
    for part in held_out:
        asked = [pair.query for pair in part]
        assert 6 <= len(asked) == len(set(asked)) <= 40
        assert all(pair.sample == 0 for pair in part)
        assert asked == sorted(asked, key=lambda query: int(query[1:]))
    assert held_out != list(split(pairs, seed=1)[1:])
    assert held_out == list(split(pairs, seed=0)[1:])


def test_twins_stay_together() -> None:
    queries = load_queries("default")
    twins = list(zip(queries[0::2], queries[1::2], strict=True))
    shuffled = [queries[index] for index in np.random.default_rng(3).permutation(len(queries))]
    together = []
    for seed in range(5):
        parts = split([pair(query, YES) for query in shuffled], seed)
        of = {one.query: number for number, part in enumerate(parts) for one in part}
        together.append(np.mean([of[one] == of[other] for one, other in twins]))
    # By chance it would be .38. Some twins have no rare word in common.
    assert np.mean(together) > 0.7


def test_several_samples_of_few_queries_are_too_few() -> None:
    with pytest.raises(QueryError, match="19 usable pairs are too few"):
        split(numbered(19, samples=4), seed=0)
