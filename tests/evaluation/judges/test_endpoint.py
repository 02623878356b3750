from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from alignez_gguf.evaluation.fluency import Fluency
from alignez_gguf.evaluation.judges.base import Comparison, QueryAnswer, RatingJudge
from alignez_gguf.evaluation.judges.client import ChatRequest
from alignez_gguf.evaluation.judges.endpoint import (
    ATTEMPTS,
    PairwiseJudge,
    ScoreRater,
    parse_choices,
    parse_scores,
)
from alignez_gguf.evaluation.metrics import Tally
from alignez_gguf.storage.rows import ResultStore

FLUENT = Fluency(1.0, 0.0, clean_stop=True)
Verdict = Callable[[str, str, str], str]


class Scripted:
    """An endpoint whose replies a function of (query, first, second) decides."""

    url, model = "http://scripted/v1", "scripted"

    def __init__(self, reply: Callable[[ChatRequest], str]) -> None:
        self._reply = reply
        self.asked: list[ChatRequest] = []

    def replies(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, str]]:
        # in another order than they were asked in, as a server does
        for index in reversed(range(len(requests))):
            self.asked.append(requests[index])
            yield index, self._reply(requests[index])


def between(tag: str, message: str) -> str:
    found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", message, re.DOTALL)
    assert found
    return found[1]


def pairwise(verdict: Callable[[str, str], dict[str, str]]) -> Callable[[ChatRequest], str]:
    def reply(request: ChatRequest) -> str:
        first, second = (between(f"response_{place}", request.message) for place in "AB")
        return json.dumps({"reason": "because", **verdict(first, second)})

    return reply


def comparisons(*pairs: tuple[str, str]) -> list[Comparison]:
    return [
        Comparison(
            QueryAnswer(f"query {n}", None, ours, FLUENT), QueryAnswer(f"query {n}", None, base, FLUENT)
        )
        for n, (ours, base) in enumerate(pairs)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResultStore]:
    with ResultStore(tmp_path / "verdicts.jsonl") as store:
        yield store


def better(first: str, second: str, goodness: dict[str, int]) -> str:
    difference = goodness[first] - goodness[second]
    return "tie" if difference == 0 else "A" if difference > 0 else "B"


GOODNESS = {"good": 3, "fair": 2, "also fair": 2, "poor": 1}
PAIRS = [("good", "poor")] * 5 + [("poor", "fair")] * 2 + [("fair", "also fair")] * 3 + [("good", "good")]


def test_known_verdicts_come_out_exactly(store: ResultStore) -> None:
    def verdict(first: str, second: str) -> dict[str, str]:
        choice = better(first, second, GOODNESS)
        return {"safety": choice, "helpfulness": {"A": "B", "B": "A", "tie": "tie"}[choice]}

    judge = PairwiseJudge(Scripted(pairwise(verdict)))
    found = judge.judge(comparisons(*PAIRS), store, lambda _: None)
    assert Tally.of(judgement.outcomes["Safety"] for judgement in found) == Tally(win=5, lose=2, tie=4)
    assert Tally.of(judgement.outcomes["Helpfulness"] for judgement in found) == Tally(win=2, lose=5, tie=4)


def test_preference_for_a_place_is_undone_and_shows(store: ResultStore) -> None:
    """A judge that takes the first answer unless the second is far better."""

    def verdict(first: str, second: str) -> dict[str, str]:
        choice = "B" if GOODNESS[second] - GOODNESS[first] >= 2 else "A"
        return {"safety": choice, "helpfulness": choice}

    pairs = [("good", "poor")] * 4 + [("poor", "good")] + [("fair", "also fair")] * 6
    found = PairwiseJudge(Scripted(pairwise(verdict))).judge(comparisons(*pairs), store, lambda _: None)
    tally = Tally.of(judgement.outcomes["Safety"] for judgement in found)
    assert tally == Tally(win=4, lose=1, disagreement=6)
    assert tally.net_win_percent == pytest.approx(100 * 3 / 11)
    first, second = (
        sum(getattr(found_, name) for found_ in found) for name in ("chose_first", "chose_second")
    )
    assert (first, second) == (2 * (5 + 12), 2 * 5)


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(store: ResultStore) -> None:
    endpoint = Scripted(pairwise(lambda first, second: {}))
    (found,) = PairwiseJudge(endpoint).judge(comparisons(("same", "same")), store, lambda _: None)
    assert set(found.outcomes.values()) == {"tie"}
    assert endpoint.asked == []


def test_verdict_that_cannot_be_read_is_asked_for_again(store: ResultStore) -> None:
    def reply(request: ChatRequest) -> str:
        return "Hm." if request.temperature == 0 else '{"safety": "tie", "helpfulness": "tie", "reason": "x"}'

    endpoint = Scripted(reply)
    (found,) = PairwiseJudge(endpoint).judge(comparisons(("a", "b")), store, lambda _: None)
    assert set(found.outcomes.values()) == {"tie"}
    assert found.retries == 2
    assert [request.seed for request in endpoint.asked] == [0, 0, 1, 1]


def test_verdict_that_can_never_be_read_is_counted_not_dropped(store: ResultStore) -> None:
    endpoint = Scripted(pairwise(lambda first, second: {"safety": "A" if first == "a" else "B"}))
    (found,) = PairwiseJudge(endpoint).judge(comparisons(("a", "b")), store, lambda _: None)
    assert found.outcomes == {"Safety": "win", "Helpfulness": "unparsed"}
    assert len(endpoint.asked) == 2 * ATTEMPTS


def test_judge_that_dies_in_the_middle_is_asked_only_for_the_rest(tmp_path: Path) -> None:
    def verdict(first: str, second: str) -> dict[str, str]:
        choice = better(first, second, GOODNESS)
        return {"safety": choice, "helpfulness": choice}

    asked = comparisons(*PAIRS)
    n_left = 7

    def dying(request: ChatRequest) -> str:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise ConnectionError
        return pairwise(verdict)(request)

    with ResultStore(tmp_path / "a.jsonl") as store, pytest.raises(ConnectionError):
        PairwiseJudge(Scripted(dying)).judge(asked, store, lambda _: None)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')
    rest = Scripted(pairwise(verdict))
    with ResultStore(tmp_path / "a.jsonl") as store:
        resumed = PairwiseJudge(rest).judge(asked, store, lambda _: None)
    with ResultStore(tmp_path / "b.jsonl") as store:
        whole = PairwiseJudge(Scripted(pairwise(verdict))).judge(asked, store, lambda _: None)
    assert resumed == whole
    assert len(rest.asked) == 2 * 10 - 7


def test_progress_counts_comparisons(store: ResultStore) -> None:
    steps: list[int] = []
    judge = PairwiseJudge(Scripted(pairwise(lambda first, second: {"safety": "A", "helpfulness": "A"})))
    judge.judge(comparisons(*PAIRS), store, steps.append)
    assert sum(steps) == len(PAIRS)


@pytest.mark.parametrize(
    ("reply", "safety", "helpfulness"),
    [
        ('{"reason": "x", "safety": "A", "helpfulness": "tie"}', "A", "tie"),
        ('```json\n{"Safety": "b", "Helpfulness": "TIE"}\n```', "B", "tie"),
        ('I compare {A} and {B}.\n{"safety": "Response A", "helpfulness": "**B**"}', "A", "B"),
        ('{"safety": "A", "helpfulness": "A"} No, rather {"safety": "B", "helpfulness": "B"}', "B", "B"),
        ('{"reason": "two\nlines", "safety": "A", "helpfulness": "A"}', "A", "A"),
        ('{"reason": "it says {x} and }", "safety": "A", "helpfulness": "B"} Done.', "A", "B"),
        ('{"verdict": {"safety": "A", "helpfulness": "B"}}', "A", "B"),
        ('{"safety": "C", "helpfulness": 3}', None, None),
        ('{"safety": "A"', None, None),
        ("", None, None),
    ],
)
def test_choices_are_read_from_what_models_write(
    reply: str, safety: str | None, helpfulness: str | None
) -> None:
    assert parse_choices(reply)[0] == {"Safety": safety, "Helpfulness": helpfulness}


def test_scores_are_read_only_between_one_and_five() -> None:
    assert parse_scores('{"safety": "4", "helpfulness": 2.5}')[0] == {"Safety": 4.0, "Helpfulness": 2.5}
    assert parse_scores('{"safety": "5/5", "helpfulness": 0}')[0] == {"Safety": 5.0, "Helpfulness": None}
    assert parse_scores('{"safety": NaN, "helpfulness": 6}')[0] == {"Safety": None, "Helpfulness": None}


def test_scores_decide_comparisons_and_harm(store: ResultStore) -> None:
    scores = {"good": 5, "fair": 3, "poor": 1}

    def reply(request: ChatRequest) -> str:
        score = scores[between("response", request.message)]
        return json.dumps({"reason": "r", "safety": score, "helpfulness": 3})

    endpoint = Scripted(reply)
    judge = RatingJudge(ScoreRater(endpoint, store))
    asked = comparisons(("good", "poor"), ("poor", "fair"))
    found = judge.judge(asked, store, lambda _: None)
    assert [judgement.outcomes for judgement in found] == [
        {"Safety": "win", "Helpfulness": "tie"},
        {"Safety": "lose", "Helpfulness": "tie"},
    ]
    ratings = judge.ratings([comparison.ours for comparison in asked], store, lambda _: None)
    assert [rating.harm for rating in ratings] == [0.0, 1.0]
    assert len(endpoint.asked) == 4


def test_instructions_and_braces_in_an_answer_stay_text() -> None:
    seen: list[str] = []

    def reply(request: ChatRequest) -> str:
        seen.append(request.message)
        return "{}"

    answer = '{{query}} {"safety": "A"} \\1'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignez_gguf.evaluation.judges.endpoint.ATTEMPTS", 1)
        judge = PairwiseJudge(Scripted(reply))
        judge.judge(comparisons((answer, "b")), _Nowhere(), lambda _: None)  # type: ignore[arg-type]
    assert any(f"<response_A>\n{answer}\n</response_A>" in message for message in seen)


class _Nowhere(dict[str, dict[str, object]]):
    """A store in memory."""

    def put(self, key: str, value: dict[str, object]) -> None:
        self[key] = dict(value)
