"""The stages of a job: what they leave in the work directory, and what they find there again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.endpoint import EndpointGenerator
from alignez_gguf.pairs.generation import answer_prompts, characteristics, default_sampling
from alignez_gguf.pairs.pairs import PairStore, PreferencePair, load_pairs
from alignez_gguf.pipeline import Job, self_generated_pairs
from alignez_gguf.pipeline.embeddings import ActivationSite, Embeddings
from alignez_gguf.pipeline.stages import (
    DirectionFit,
    base_answers,
    fit_directions,
    given_pairs,
    persona_divergence,
    usable_pairs,
)
from alignez_gguf.readout import Hook
from tests.pipeline.conftest import QUERIES, Watched, texts, with_engine

PAIR = PreferencePair("How do I bake?", "With care and time.", "Go away now.", "be kind", "be rude")


def test_pairs_that_are_done_are_not_asked_for_again(job: Job) -> None:
    first = self_generated_pairs(job, QUERIES[:4])
    (path,) = job.work.path.glob("pairs-*.jsonl")
    marked = replace(first[2], helpful="marked")
    path.unlink()
    with PairStore(path) as store:
        for pair in (first[0], first[1], marked, first[3]):
            store.append(pair)
    again = self_generated_pairs(job, QUERIES[:6])
    assert again[:4] == [first[0], first[1], marked, first[3]]
    written = {pair.query: pair for pair in load_pairs(path)}  # as they were done
    assert [written[query] for query in QUERIES[:6]] == again


def test_no_queries_ask_the_model_nothing(job: Job) -> None:
    watched = Watched(job.engine)
    job = with_engine(job, watched)
    assert self_generated_pairs(job, []) == []
    kept, report = usable_pairs(job, [], [PAIR])
    assert (kept, report.total, report.kept) == ([PAIR], 1, 1)
    assert watched.counts == {}


def test_every_generator_has_pairs_of_its_own(job: Job) -> None:
    def place(generator: Any) -> str:
        class Stop(Exception):  # noqa: N818
            pass

        class Silent:
            info = getattr(generator, "info", None)

            def __repr__(self) -> str:
                return repr(generator)

            def generate(self, *_: Any, **__: Any) -> Any:
                raise Stop

        silent = Silent()
        if silent.info is None:
            del Silent.info
        before = set(job.work.path.glob("pairs-*"))
        with pytest.raises(Stop):
            self_generated_pairs(replace(job, generator=silent), QUERIES[:2])
        made = set(job.work.path.glob("pairs-*")) - before
        for path in made:
            path.unlink()
        (path,) = made
        return path.name

    first = place(EndpointGenerator("http://localhost:1", model="m"))
    # An address in memory would be another in the next process.
    assert place(EndpointGenerator("http://localhost:1", model="m")) == first
    assert place(EndpointGenerator("http://localhost:2", model="m")) != first
    assert place(EndpointGenerator("http://localhost:1", model="n")) != first


def test_given_pairs_get_the_characteristics_that_the_model_names(job: Job) -> None:
    bare = [
        PreferencePair(" How do I bake?\n", " With care. ", "Go away.", weight=2.0),
        PreferencePair("How do I bake?", "Slowly.", "Never."),
        replace(PAIR, sample=7),
    ]
    watched = Watched(job.engine)
    job = with_engine(job, watched)
    found = given_pairs(job, bare)
    sampling = replace(default_sampling(job.templates), max_tokens=24)
    keys = [("How do I bake?", 0), ("How do I bake?", 1)]
    traits = characteristics(job.engine, keys, job.templates, sampling, job.settings.seed)
    assert [(pair.helpful_characteristics, pair.harmful_characteristics) for pair in found] == [
        *traits,
        ("be kind", "be rude"),
    ]
    assert texts(found) == [*keys, ("How do I bake?", 2)]
    assert [(pair.helpful, pair.harmful, pair.weight) for pair in found[:2]] == [
        ("With care.", "Go away.", 2.0),
        ("Slowly.", "Never.", 1.0),
    ]
    watched.counts.clear()
    assert given_pairs(job, bare) == found
    assert watched.counts == {}


def test_given_pairs_are_not_held_against_the_likelihoods_of_the_model(job: Job) -> None:
    generated = self_generated_pairs(job, QUERIES[:6])
    swapped = [
        replace(pair, helpful=pair.harmful, harmful=pair.helpful) for pair in generated if pair.helpful
    ]
    _, as_generated = usable_pairs(job, swapped, [])
    _, as_given = usable_pairs(job, [], swapped)
    assert as_generated.persona_ignored > 0
    assert as_given.persona_ignored == 0
    assert as_given.kept >= as_generated.persona_ignored


def test_interrupted_comparison_of_personas_goes_on_where_it_was(job: Job) -> None:
    generated = self_generated_pairs(job, QUERIES[:8])
    expected = usable_pairs(job, generated, [])
    next(job.work.path.glob("margins-*")).unlink()

    class Interrupted(Watched):
        def response_logprobs(self, passages: Sequence[Passage], **options: Any) -> Iterator[float]:
            yield from islice(job.engine.response_logprobs(passages, **options), 4 * 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        usable_pairs(with_engine(job, Interrupted(job.engine)), generated, [])
    watched = Watched(job.engine)
    assert usable_pairs(with_engine(job, watched), generated, []) == expected
    assert watched.counts == {"response_logprobs": 4 * (8 - 3)}


def test_personas_are_compared_once_for_a_pair_and_only_where_its_texts_differ(job: Job) -> None:
    generated = self_generated_pairs(job, QUERIES[:6])
    usable_pairs(job, generated[:4], [])
    watched = Watched(job.engine)
    useless = [replace(generated[0], helpful=""), replace(generated[1], helpful=generated[1].harmful)]
    _, report = usable_pairs(with_engine(job, watched), [*useless, *generated[::-1]], [])
    assert watched.counts == {"response_logprobs": 4 * 2}
    assert (report.empty, report.identical) == (1, 1)


@pytest.mark.parametrize("hooks", [("mlp",), ("mlp", "residual")])
def test_prompts_are_read_while_personas_are_compared(job: Job, hooks: Sequence[Hook]) -> None:
    generated = self_generated_pairs(job, QUERIES[:6])
    places = [ActivationSite("prompt", hook) for hook in hooks]
    elsewhere = [ActivationSite("response", hook) for hook in hooks]
    watched = Watched(job.engine)
    watched_job = with_engine(job, watched)
    plain, _ = usable_pairs(watched_job, generated, [])
    assert watched.counts == {"response_logprobs": 4 * 6}
    shutil.rmtree(job.work.path)
    job.work.path.mkdir()
    pairs, _ = usable_pairs(watched_job, generated, [], [*places, *elsewhere])
    assert pairs == plain
    assert watched.counts == {"response_logprobs": 2 * 4 * 6, "activations": 2 * 6}
    for place in places:
        helpful, harmful = Embeddings(watched_job, pairs, places).at(place)
        for row, pair in enumerate(pairs):
            passages = list(map(Passage, answer_prompts(job.templates, pair)))
            expected = [found[0] for found in job.engine.activations(passages, [place.readout])]
            np.testing.assert_array_equal(np.stack(list(helpful))[:, row], expected[0])
            np.testing.assert_array_equal(np.stack(list(harmful))[:, row], expected[1])
    assert watched.counts["activations"] == 2 * 6


def test_weights_decide_the_fit_and_nothing_that_the_model_computes(job: Job) -> None:
    pairs = self_generated_pairs(job, QUERIES[:12])
    heavy = [replace(pair, weight=3.0 if index % 2 else 1.0) for index, pair in enumerate(pairs)]
    repeated = [index for index, pair in enumerate(heavy) for _ in range(int(pair.weight))]
    watched = Watched(job.engine)
    job = with_engine(job, watched)
    place = ActivationSite("prompt", "mlp")

    def fitted(pairs: Sequence[PreferencePair]) -> DirectionFit:
        return fit_directions(Embeddings(job, pairs, [place]), "mean", place, 1)

    plain = fitted(pairs)
    usable_pairs(job, pairs, [])
    watched.counts.clear()
    weighted = fitted(heavy)
    usable_pairs(job, heavy, [])
    assert watched.counts == {}
    expected = fitted([pairs[index] for index in repeated])
    np.testing.assert_allclose(weighted.class_gap, expected.class_gap, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weighted.directions.vectors, expected.directions.vectors, atol=1e-4)
    assert not np.allclose(weighted.class_gap, plain.class_gap, rtol=1e-3)


def test_fit_comes_back_from_the_work_directory_as_it_was(job: Job) -> None:
    pairs = self_generated_pairs(job, QUERIES[:8])
    place = ActivationSite("response", "mlp")
    first, again = (fit_directions(Embeddings(job, pairs, [place]), "ccs", place, 1) for _ in range(2))
    assert first is not again
    np.testing.assert_array_equal(first.class_gap, again.class_gap)
    for name in ("vectors", "p_helpful", "p_harmful", "accuracy", "loss", "spread"):
        np.testing.assert_array_equal(getattr(first.directions, name), getattr(again.directions, name))
    assert first.directions.method == again.directions.method == "ccs"


def test_persona_divergence_is_the_mean_log_ratio_along_the_own_answers(job: Job) -> None:
    pairs = self_generated_pairs(job, QUERIES[:6])
    total = n_tokens = 0.0
    for pair, answer in zip(pairs, base_answers(job, pairs), strict=True):
        if answer.text:
            plain = Passage(job.templates.plain_prompt(pair.query), answer.text)
            asked = Passage(answer_prompts(job.templates, pair)[0], answer.text)
            base, persona = job.engine.response_logprobs([plain, asked])
            total += base - persona
            n_tokens += answer.n_tokens
    assert persona_divergence(job, pairs) == pytest.approx(total / n_tokens)
    assert total != 0
