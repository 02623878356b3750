from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from alignez_gguf.engines.base import Passage
from alignez_gguf.evaluation.answers import OTHER_QUERIES, Answer, measure_fluency, measure_topic
from alignez_gguf.evaluation.fluency import Fluency, FluencyRule, disorder, fluency_limit
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.storage.rows import ResultStore
from alignez_gguf.text.repetition import is_broken, repetition


def fluency(nat_per_token: float | None, n_tokens: int | None = None) -> Fluency:
    return Fluency(nat_per_token, 0.0, clean_stop=True, n_tokens=n_tokens)


def test_limit_lies_between_the_base_models_answers_and_their_words_in_random_order() -> None:
    own = [fluency(float(n)) for n in range(101)] + [fluency(None)]
    assert fluency_limit(own, [fluency(200.0), fluency(205.0), fluency(900.0)]) == pytest.approx(150)
    assert fluency_limit(own, []) == float("inf")
    assert fluency_limit([fluency(None)], own) == float("inf")


def test_first_word_of_a_short_answer_may_surprise() -> None:
    # As measured on SmolLM2-135M-Instruct, whose own answers take about 1 nat per token.
    rule = FluencyRule(4.4)
    assert rule.reads_well("That is illegal.", fluency(6.1, 4))
    assert rule.reads_well("I can't tell you that, because teasing hurts people.", fluency(4.3, 12))
    assert not rule.reads_well("I you hurts tell can't because that, teasing people.", fluency(7.6, 12))
    assert not rule.reads_well("the the of and to in a is", fluency(6.2, 8))


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "42",
        "1. Boil the water.\n2. Add the rice.\n\n-----------------------------\nServes two.",
        "It costs 1000000000000 dollars.",
        "Use `a[i] += 1;` in the loop.",
        "\u4f60\u597d\uff0c\u6211\u4e0d\u77e5\u9053\u3002",
        "Ha ha ha, that is funny!",
    ],
)
def test_short_answers_lists_numbers_code_and_other_scripts_are_whole(text: str) -> None:
    assert FluencyRule().reads_well(text, Fluency.of_text(text))


@pytest.mark.parametrize(
    "text", ["", "  ", "J" * 40, "Ad-" + "12" * 15, "</b></b>", "{}();{}();", "a\ufffdb"]
)
def test_loops_and_debris_are_broken(text: str) -> None:
    assert is_broken(text)


def test_repetition_sees_words_that_no_space_parts() -> None:
    assert repetition("Thea,s,s,s,s,s,s,s,s,s,s") > 0.5
    assert repetition("one two three four five") == 0


def test_disorder_keeps_the_words_and_is_the_same_every_time() -> None:
    text = "one two three four five six seven"
    mixed = disorder(text)
    assert mixed == disorder(text) != text
    assert mixed is not None
    assert sorted(mixed.split()) == sorted(text.split())
    assert disorder("too few words") is None


class WordModel:
    """P of an answer: a nat for each of its words that its prompt has, and three for every other one."""

    def __init__(self) -> None:
        self.n_read = 0

    def response_logprobs(
        self, passages: Sequence[Passage], *, max_tokens: int | None = None
    ) -> Iterator[float]:
        for passage in passages:
            self.n_read += 1
            words = passage.response.split()[:max_tokens]
            yield -float(sum(1 if word in passage.prompt.split() else 3 for word in words))


CONTINUED = Templates.default().continued
PROMPTS = ["boil an egg", "paint a fence", "fold a map", "feed a cat", "mend a sock", "ride a horse"]


def topics(model: WordModel, texts: dict[str, list[str]], folder: Path) -> dict[str, list[float | None]]:
    answers = {name: [Answer(text, clean_stop=True) for text in given] for name, given in texts.items()}
    with ResultStore(folder / "topic.jsonl") as store:
        return measure_topic(
            model, PROMPTS, answers, store, seed=0, advance=lambda _: None, continued=CONTINUED
        )


def test_topic_is_how_much_likelier_an_answer_is_under_its_own_query(tmp_path: Path) -> None:
    about = [f"{prompt.split()[0]} {prompt.split()[2]}" for prompt in PROMPTS]
    stray = ["digits"] * len(PROMPTS)
    found = topics(WordModel(), {"base": about, "steered": stray}, tmp_path)
    assert found["base"] == pytest.approx([-2 - math.log(math.exp(-6))] * len(PROMPTS))
    assert found["steered"] == pytest.approx([0.0] * len(PROMPTS))


def test_topic_of_an_empty_answer_is_unknown_and_nothing_is_read_twice(tmp_path: Path) -> None:
    model = WordModel()
    texts = {"base": ["", *PROMPTS[1:]]}
    first = topics(model, texts, tmp_path)
    assert first["base"][0] is None
    assert model.n_read == 5 * (1 + OTHER_QUERIES)
    assert topics(model, texts, tmp_path) == first
    assert model.n_read == 5 * (1 + OTHER_QUERIES)


def test_fluency_knows_how_many_tokens_it_was_measured_over(tmp_path: Path) -> None:
    answers = [Answer("egg", clean_stop=True), Answer("", clean_stop=True)]
    with ResultStore(tmp_path / "fluency.jsonl") as store:
        found = measure_fluency(
            WordModel(),
            lambda text: list(range(len(text.split()))),
            PROMPTS[:2],
            answers,
            store,
            lambda _: None,
            continued=CONTINUED,
        )
    assert found == [fluency(1.0, 1), fluency(None)]
