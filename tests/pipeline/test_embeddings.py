"""Where pairs are embedded, in how many passes, and what is found in the work directory again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.pairs.generation import answer_prompts, answered
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Job, self_generated_pairs
from alignez_gguf.pipeline.embeddings import ActivationSite, Embeddings
from alignez_gguf.readout import Readout
from tests.pipeline.conftest import QUERIES, Watched, with_engine

PAIR = PreferencePair("How do I bake?", "With care and time.", "Go away now.", "be kind", "be rude")
PLACES = [
    ActivationSite(reading, hook)
    for reading in ("prompt", "response", "response-mean")
    for hook in ("mlp", "residual")
]
RESPONSE, MEAN = ActivationSite("response", "mlp"), ActivationSite("response-mean", "mlp")


class Interrupting:
    """An engine that is interrupted after some texts have been read."""

    def __init__(self, engine: Any, after: int) -> None:
        self._engine = engine
        self._after = after
        self.n_read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def activations(
        self, passages: Sequence[Passage], readouts: Sequence[Readout]
    ) -> Iterator[NDArray[np.float16]]:
        for output in self._engine.activations(passages, readouts):
            if self.n_read == self._after:
                raise KeyboardInterrupt
            self.n_read += 1
            yield output


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_pairs_are_embedded_where_the_place_says(job: Job, place: ActivationSite) -> None:
    found = Embeddings(job, [PAIR], PLACES).at(place)
    prompts, responses = answer_prompts(job.templates, PAIR), answered(job.templates, PAIR)
    passages = [Passage(prompt) for prompt in prompts] if place.reading == "prompt" else list(responses)
    readout = Readout(place.hook, "mean" if place.reading == "response-mean" else "last")
    (helpful,), (harmful,) = job.engine.activations(passages, [readout])
    np.testing.assert_array_equal(np.stack(list(found.helpful))[:, 0], helpful)
    np.testing.assert_array_equal(np.stack(list(found.harmful))[:, 0], harmful)
    assert not np.array_equal(helpful, harmful)


def test_each_text_is_computed_once_for_all_places(job: Job) -> None:
    watched = Watched(job.engine)
    other = replace(PAIR, harmful="Never.", sample=1)  # asked for by the same prompts
    embeddings = Embeddings(with_engine(job, watched), [PAIR, PAIR, other], PLACES)
    assert watched.counts == {}
    for place in PLACES:
        embeddings.at(place)
    n_prompts, n_answers = 2, 3
    assert watched.counts == {"activations": n_prompts + n_answers}


def test_what_was_read_of_a_text_serves_every_list_of_pairs(job: Job) -> None:
    pairs = self_generated_pairs(job, QUERIES[:6])
    watched = Watched(job.engine)
    job = with_engine(job, watched)
    few = np.stack(list(Embeddings(job, pairs[2:4], [RESPONSE]).at(RESPONSE).harmful))
    watched.counts.clear()
    many = Embeddings(job, [replace(pair, weight=2.0) for pair in pairs[::-1]], [RESPONSE]).at(RESPONSE)
    assert watched.counts == {"activations": 2 * 4}
    np.testing.assert_array_equal(np.stack(list(many.harmful))[:, [3, 2]], few)


def test_no_pairs_are_embedded_nowhere(job: Job) -> None:
    watched = Watched(job.engine)
    found = Embeddings(with_engine(job, watched), [], PLACES).at(RESPONSE)
    assert [layer.shape for layer in found.helpful] == [(0, job.engine.info.n_embd)] * len(found.harmful)
    assert watched.counts == {}


def test_place_that_an_earlier_run_has_read_is_not_read_again(job: Job) -> None:
    alone = Embeddings(job, [PAIR], [RESPONSE]).at(RESPONSE)
    before = np.stack(list(alone.helpful))
    watched = Watched(job.engine)
    embeddings = Embeddings(with_engine(job, watched), [PAIR], [RESPONSE, MEAN])
    np.testing.assert_array_equal(np.stack(list(embeddings.at(RESPONSE).helpful)), before)
    embeddings.at(MEAN)
    assert watched.counts == {"activations": 2}
    Embeddings(with_engine(job, watched), [PAIR], [RESPONSE, MEAN]).at(MEAN)
    assert watched.counts == {"activations": 2}


def test_reading_that_was_interrupted_goes_on_with_the_missing_pairs(job: Job, engine: LlamaEngine) -> None:
    pairs = self_generated_pairs(job, QUERIES[:9])
    both = [RESPONSE, MEAN]

    def read(by: Any) -> list[NDArray[np.float16]]:
        embeddings = Embeddings(with_engine(job, by), pairs, both)
        return [
            np.stack(list(side))
            for place in both
            for found in [embeddings.at(place)]
            for side in (found.helpful, found.harmful)
        ]

    expected = read(engine)
    for path in job.work.path.glob("activations-*"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        read(Interrupting(engine, after=11))
    rest = Interrupting(engine, after=-1)
    np.testing.assert_array_equal(read(rest), expected)
    assert rest.n_read == 2 * len(pairs) - 11
