from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.engines.base import Completion, GenerationRequest, Passage, Sampling
from alignez_gguf.errors import QueryError
from alignez_gguf.pairs import generation
from alignez_gguf.pairs.generation import (
    MARGIN_TOKENS,
    answer_prompts,
    compare_personas,
    default_sampling,
    generate_pairs,
    request_seed,
    whole_sentences,
)
from alignez_gguf.pairs.pairs import PairStore, PreferencePair
from alignez_gguf.prompts.templates import Persona, Templates
from alignez_gguf.readout import Readout

TEMPLATES = Templates(
    version="t",
    plain="{few_shot}Q: {query}\nA:",
    few_shot="EXAMPLE\n",
    stop=("\nQ:",),
    helpful=Persona("{query}. Good should:", "Be good, {characteristics}.\nQ: {query}\nA:"),
    harmful=Persona("{query}. Bad should:", "Be bad, {characteristics}.\nQ: {query}\nA:"),
)
SAMPLING = Sampling(max_tokens=90, temperature=0.7, top_p=0.9, stop=("\nQ:",))
QUERIES = ["how?", "why?", "when?", "where?", "who?"]


class FakeEngine:
    """Answers with its prompt's first line and the seed, and finishes in reverse order."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[GenerationRequest], Sampling]] = []

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        self.calls.append((list(requests), sampling))
        for index, request in reversed(list(enumerate(requests))):
            yield index, self.complete(request)

    def complete(self, request: GenerationRequest) -> Completion:
        if request.prompt.endswith("should:"):
            return Completion(f" be {request.seed}\n  and\tcalm. ", 5, "length")
        cut = "bad" in request.prompt and "why?" in request.prompt
        if cut:
            return Completion(f" Whole {request.seed}. Then cu", 5, "length")
        return Completion(f"  answer {request.seed} \n", 5, "stop")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PairStore]:
    with PairStore(tmp_path / "pairs.jsonl") as store:
        yield store


def run(engine: FakeEngine, store: PairStore, queries: list[str], seed: int = 0) -> list[PreferencePair]:
    return generate_pairs(engine, queries, TEMPLATES, store, sampling=SAMPLING, seed=seed)  # type: ignore[arg-type]


def asked(engine: FakeEngine) -> list[str]:
    return [request.prompt for requests, _ in engine.calls for request in requests]


def test_characteristics_are_asked_for_first_and_answers_under_them(store: PairStore) -> None:
    engine = FakeEngine()
    (pair,) = run(engine, store, ["how?"])

    (traits, traits_sampling), (answers, answers_sampling) = engine.calls
    assert [request.prompt for request in traits] == ["how. Good should:", "how. Bad should:"]
    good, bad = (f"be {request.seed} and calm" for request in traits)
    assert [request.prompt for request in answers] == [
        f"Be good, {good}.\nQ: how?\nA:",
        f"Be bad, {bad}.\nQ: how?\nA:",
    ]
    assert answers_sampling == SAMPLING
    assert traits_sampling == replace(SAMPLING, max_tokens=50, temperature=0.3)
    assert pair == PreferencePair(
        query="how?",
        helpful=f"answer {answers[0].seed}",
        harmful=f"answer {answers[1].seed}",
        helpful_characteristics=good,
        harmful_characteristics=bad,
    )
    assert all(request.strength == 0 for request in (*traits, *answers))


OWN = replace(
    TEMPLATES,
    helpful=replace(TEMPLATES.helpful, traits="be kind"),
    harmful=replace(TEMPLATES.harmful, traits="be rude"),
)


@pytest.mark.parametrize(
    ("said", "traits"),
    [
        ("be short\nand clear.", "be short and clear"),
        ("1. Never leave your keys. 2. Lock it.", "be kind"),
        ("\n- Take a towel\n- Go home", "be kind"),
        ("I'm sorry, but I can't help with that.", "be kind"),
        ("  \n", "be kind"),
    ],
)
def test_traits_of_the_persona_stand_in_where_the_model_names_none(
    store: PairStore, said: str, traits: str
) -> None:
    engine = FakeEngine()
    complete = engine.complete
    engine.complete = lambda request: (  # type: ignore[method-assign]
        Completion(said, 5, "stop") if request.prompt.endswith("Good should:") else complete(request)
    )
    (pair,) = generate_pairs(engine, ["how?"], OWN, store, sampling=SAMPLING)  # type: ignore[arg-type]
    assert pair.helpful_characteristics == traits
    assert pair.harmful_characteristics.startswith("be ")


def test_personas_without_characteristics_are_asked_for_answers_alone(store: PairStore) -> None:
    shown = replace(
        TEMPLATES,
        helpful=Persona("", "Be good.\nQ: {query}\nA:"),
        harmful=Persona("", "Be bad.\nQ: {query}\nA:"),
    )
    engine = FakeEngine()
    (pair,) = generate_pairs(engine, ["how?"], shown, store, sampling=SAMPLING)  # type: ignore[arg-type]
    assert asked(engine) == ["Be good.\nQ: how?\nA:", "Be bad.\nQ: how?\nA:"]
    assert (pair.helpful_characteristics, pair.harmful_characteristics) == ("", "")


def test_characteristics_take_no_more_tokens_than_answers_may(store: PairStore) -> None:
    engine = FakeEngine()
    generate_pairs(engine, ["how?"], TEMPLATES, store, sampling=Sampling(max_tokens=7))  # type: ignore[arg-type]
    assert [sampling.max_tokens for _, sampling in engine.calls] == [7, 7]


def test_answer_cut_at_the_limit_ends_with_a_sentence_and_marks_its_pair(store: PairStore) -> None:
    pairs = run(FakeEngine(), store, QUERIES)
    (cut,) = [pair for pair in pairs if pair.truncated]
    assert cut.query == "why?"
    assert re.fullmatch(r"Whole \d+\.", cut.harmful)
    assert cut.helpful.startswith("answer ")


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two! Three? Fou", "One. Two! Three?"),
        ("One.", "One."),
        ('He said "no." Then', 'He said "no."'),
        ("(As I said.) Then", "(As I said.)"),
        ("“Nein!” sag", "“Nein!”"),
        ("It costs 3.50 euros", "It costs 3.50 euros"),
        ("Wait… I", "Wait…"),
        ("First.\nSecond", "First."),
        ("1. Be kind. 2. Be calm. 3.", "1. Be kind. 2. Be calm."),
        ("Be kind:\n1. Listen.\n2.", "Be kind:\n1. Listen."),
        ("1. never leave your keys 2.", "1. never leave your keys 2."),
        ("It began in 1990. Then", "It began in 1990."),
        ("no sentence at all", "no sentence at all"),
        ("行きます。それか", "行きます。"),
        ("", ""),
    ],
)
def test_whole_sentences_end_where_one_does(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


def test_pairs_come_in_the_order_of_the_queries_and_are_stored(store: PairStore) -> None:
    pairs = run(FakeEngine(), store, QUERIES)
    assert [pair.query for pair in pairs] == QUERIES
    assert list(store) == pairs[::-1]  # as they were completed


def test_every_pair_is_stored_as_soon_as_both_its_answers_are_there(store: PairStore) -> None:
    engine = FakeEngine()
    complete, kept = engine.complete, []

    def counted(request: GenerationRequest) -> Completion:
        kept.append(len(store))
        return complete(request)

    engine.complete = counted  # type: ignore[method-assign]
    run(engine, store, ["how?", "why?", "when?"])
    assert kept[6:] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_pairs_depend_neither_on_their_order_nor_on_the_chunk(
    store: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    expected = {pair.query: pair for pair in run(FakeEngine(), store, QUERIES)}
    monkeypatch.setattr(generation, "_CHUNK", chunk)
    with PairStore(tmp_path / "other.jsonl") as other:
        pairs = run(FakeEngine(), other, QUERIES[::-1])
    assert pairs == [expected[query] for query in QUERIES[::-1]]


def test_every_request_has_a_seed_of_its_own(store: PairStore, tmp_path: Path) -> None:
    engine = FakeEngine()
    run(engine, store, QUERIES, seed=0)
    with PairStore(tmp_path / "other.jsonl") as other:
        run(engine, other, QUERIES, seed=1)
    seeds = [request.seed for requests, _ in engine.calls for request in requests]
    assert len(set(seeds)) == len(seeds) == 2 * 4 * len(QUERIES)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert request_seed(0, "how?", "helpful", "answer") == 856297338
    assert request_seed(0, "a\udcff") != request_seed(0, "a")


def test_only_missing_pairs_are_asked_for(store: PairStore) -> None:
    engine = FakeEngine()
    first = run(engine, store, QUERIES[1:3])
    engine.calls.clear()
    advanced: list[int] = []
    pairs = generate_pairs(
        engine,  # type: ignore[arg-type]
        QUERIES,
        TEMPLATES,
        store,
        sampling=SAMPLING,
        advance=advanced.append,
    )
    assert pairs[1:3] == first
    assert {re.search(r"how|why|when|where|who", prompt)[0] for prompt in asked(engine)} == {
        "how",
        "where",
        "who",
    }  # type: ignore[index]
    assert advanced == [2, 1, 1, 1]
    assert len(store) == 5

    engine.calls.clear()
    assert run(engine, store, QUERIES) == pairs
    assert engine.calls == []


def test_pairs_before_an_error_are_kept(store: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_CHUNK", 1)
    engine = FakeEngine()
    complete = engine.complete

    def refuse(request: GenerationRequest) -> Completion:
        if "when?" in request.prompt:
            raise QueryError("too long")
        return complete(request)

    monkeypatch.setattr(engine, "complete", refuse)
    with pytest.raises(QueryError):
        run(engine, store, QUERIES)
    assert [pair.query for pair in store] == ["how?", "why?"]


def test_default_sampling_ends_an_answer_after_its_first_sentences() -> None:
    sampling = default_sampling(TEMPLATES)
    assert (sampling.max_tokens, sampling.stop) == (48, ("\nQ:",))
    assert sampling.temperature > 0


def test_several_samples_of_a_query_differ_and_follow_each_other(store: PairStore, tmp_path: Path) -> None:
    engine = FakeEngine()

    def sampled(samples: int, store: PairStore) -> list[PreferencePair]:
        return generate_pairs(engine, QUERIES, TEMPLATES, store, sampling=SAMPLING, samples=samples)  # type: ignore[arg-type]

    one = sampled(1, store)
    engine.calls.clear()
    three = sampled(3, store)
    assert [(pair.query, pair.sample) for pair in three] == [(q, n) for q in QUERIES for n in range(3)]
    assert three[::3] == one
    assert len(asked(engine)) == 4 * 2 * len(QUERIES)  # those of the first sample are there already
    assert len({pair.helpful for pair in three}) == len(three)
    with PairStore(tmp_path / "fresh.jsonl") as fresh:
        assert sampled(3, fresh) == three
    assert sampled(1, store) == one


class LikelihoodEngine:
    """log P(response | prompt) is drawn at random for each passage, and the same whenever it is asked."""

    def __init__(self) -> None:
        self.computed: list[Passage] = []
        self.max_tokens: int | None = None

    def response_logprobs(
        self, passages: Sequence[Passage], *, max_tokens: int | None = None
    ) -> Iterator[float]:
        self.max_tokens = max_tokens
        return (self.logprob(passage) for passage in passages)

    def logprob(self, passage: Passage) -> float:
        self.computed.append(passage)
        return -50 * np.random.default_rng(request_seed(0, repr(passage))).random()

    def activations(
        self, passages: Sequence[Passage], readouts: Sequence[Readout]
    ) -> Iterator[NDArray[np.float16]]:
        return (self.read(passage, readouts) for passage in passages)

    def read(self, passage: Passage, readouts: Sequence[Readout]) -> NDArray[np.float16]:
        self.computed.append(passage)
        seed = request_seed(0, repr(passage))
        return np.random.default_rng(seed).normal(size=(len(readouts), 2, 3)).astype(np.float16)


def test_margin_is_the_log_likelihood_ratio_of_the_personas() -> None:
    engine = LikelihoodEngine()
    pairs = [
        PreferencePair("how?", "with care", "get lost", "kind", "rude"),
        PreferencePair("who?", "me", "you", "calm", "wild"),
    ]
    compared = compare_personas(engine, pairs, TEMPLATES)  # type: ignore[arg-type]
    for pair, found in zip(pairs, compared, strict=True):
        as_helpful, as_harmful = answer_prompts(TEMPLATES, pair)
        expected = [
            engine.logprob(Passage(own, f" {answer}")) - engine.logprob(Passage(other, f" {answer}"))
            for own, other, answer in (
                (as_helpful, as_harmful, pair.helpful),
                (as_harmful, as_helpful, pair.harmful),
            )
        ]
        assert found.margins == pytest.approx(tuple(expected))
        assert found.prompts == {}
    assert engine.max_tokens == MARGIN_TOKENS


def test_each_prompt_is_read_just_before_the_answers_to_it_and_when_it_is_asked_for() -> None:
    engine = LikelihoodEngine()
    pairs = [PreferencePair(f"how {n}?", "with care", "get lost", "kind", "rude") for n in range(3)]
    plain = list(compare_personas(engine, pairs, TEMPLATES))  # type: ignore[arg-type]
    engine.computed.clear()
    readouts = [Readout("mlp"), Readout("residual")]
    compared = compare_personas(engine, pairs, TEMPLATES, readouts)  # type: ignore[arg-type]
    for number, pair in enumerate(pairs):
        assert len(engine.computed) == 6 * number
        found = next(compared)
        prompts = answer_prompts(TEMPLATES, pair)
        assert engine.computed[6 * number :] == [
            Passage(prompt, response) for prompt in prompts for response in ("", " with care", " get lost")
        ]
        assert found.margins == plain[number].margins
        assert list(found.prompts) == [Passage(prompt) for prompt in prompts]
        for prompt, values in found.prompts.items():
            np.testing.assert_array_equal(values, engine.read(prompt, readouts))
        del engine.computed[6 * (number + 1) :]
    assert next(compared, None) is None


def test_no_pairs_are_not_compared() -> None:
    assert not list(compare_personas(LikelihoodEngine(), [], TEMPLATES, [Readout()]))  # type: ignore[arg-type]
