"""Requests that arrive while others run, in the order in which a server would hand them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from alignez_gguf.engines.base import Completion, Sampling
from alignez_gguf.engines.llama.batching import Batch, Failed, QueuedRequest, SequenceRequest
from alignez_gguf.engines.llama.sequences import EXACT_CHUNK_TOKENS
from alignez_gguf.runtime.model import Model
from tests.models import quantized, tiny_model

LONG = 4 * EXACT_CHUNK_TOKENS


@pytest.fixture(scope="module", params=["F32", "Q8_0"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    gguf = tiny_model("llama").gguf
    with Model(gguf if request.param == "F32" else quantized(gguf, request.param)) as model:
        yield model


@pytest.fixture
def batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    """One that computes a chunk of a prompt between two steps."""
    monkeypatch.setattr(Model, "ends_text", lambda *_: False)
    with closing(Batch(model, n_ctx=512, n_parallel=4, n_threads=1, prefill_tokens=1)) as batch:
        yield batch


def request(first: int, length: int, n_new: int, **fields: Any) -> SequenceRequest:
    tokens = [5 + (first + 7 * position) % 250 for position in range(length)]
    return SequenceRequest(tokens, Sampling(n_new, temperature=1.0), seed=first, **fields)


class Arrivals:
    """Hands each request in at a step of its own, and hears what becomes of it."""

    def __init__(self, batch: Batch, requests: Sequence[tuple[int, SequenceRequest]]) -> None:
        self.batch = batch
        self.heard: list[list[object]] = [[] for _ in requests]
        self.queued = [
            QueuedRequest(one, self.heard[index].append) for index, (_, one) in enumerate(requests)
        ]
        self._waiting = [(at, queued) for (at, _), queued in zip(requests, self.queued, strict=True)]
        self.n_steps = 0

    def run(self, after_step: Callable[[int], None] = lambda _: None) -> list[str]:
        """Return the text after each prompt, once no request waits or runs."""
        while self._waiting or self.batch.n_running:
            self.batch.step(self._take)
            self.n_steps += 1
            after_step(self.n_steps)
        ends = [events[-1] if events else None for events in self.heard]
        return [end.text if isinstance(end, Completion) else "" for end in ends]

    def _take(self, room: int) -> QueuedRequest | None:
        if not self._waiting or self._waiting[0][0] > self.n_steps:
            return None
        if self._waiting[0][1].request.n_sequences > room:
            return None
        return self._waiting.pop(0)[1]


@pytest.mark.parametrize("divergence", [False, True])
def test_prompt_that_is_prefilled_beside_a_lone_sequence_changes_neither(
    batch: Batch, divergence: bool
) -> None:
    """The lone one is padded, and the prompt of the other lies in sequences of its own meanwhile."""
    requests = [request(1, LONG, 24), request(2, LONG, 24, divergence=divergence)]
    alone = [Arrivals(batch, [(0, one)]).run()[0] for one in requests]
    batch.fail("nothing of it may be reused")
    together = Arrivals(batch, [(0, requests[0]), (6, requests[1])])
    assert together.run() == alone
    assert len(set(alone)) == 2


def test_sequences_that_end_while_a_prompt_is_prefilled_leave_it_alone(batch: Batch) -> None:
    requests = [request(1, 5, 6), request(2, 5, 9), request(3, LONG, 12), request(4, 5, 12)]
    alone = [Arrivals(batch, [(0, one)]).run()[0] for one in requests]
    batch.fail("nothing of it may be reused")
    assert Arrivals(batch, list(zip((0, 0, 3, 3), requests, strict=True))).run() == alone


def test_request_that_is_cancelled_in_its_prompt_gives_its_place_to_the_next(batch: Batch) -> None:
    follower = request(2, LONG, 12)
    (alone,) = Arrivals(batch, [(0, follower)]).run()
    arrivals = Arrivals(batch, [(0, request(1, LONG, 12)), (0, follower)])

    def cancel_first(n_steps: int) -> None:
        if n_steps == 2:
            assert batch.n_running == 1
            arrivals.queued[0].cancel()

    assert arrivals.run(cancel_first) == ["", alone]
    assert arrivals.heard[0] == []


def test_failure_ends_what_runs_and_what_arrives_once(batch: Batch) -> None:
    arrivals = Arrivals(batch, [(0, request(1, 5, 200)), (2, request(2, LONG, 9, divergence=True))])
    arrivals.run(lambda n_steps: batch.fail("out of memory") if n_steps == 5 else None)
    for events in arrivals.heard:
        assert [event for event in events if isinstance(event, Failed)] == [Failed("out of memory")]
        assert not any(isinstance(event, Completion) for event in events)
    assert batch.n_running == 0
