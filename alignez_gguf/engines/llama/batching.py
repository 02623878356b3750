"""Continuous batching: many sequences are decoded together, and a waiting one joins as soon as there is room.

All of them share a context and its batches, whichever control steers them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits
from alignez_gguf.control.gate import Gate
from alignez_gguf.engines.base import Completion, Sampling
from alignez_gguf.engines.completion import StreamingCompletion
from alignez_gguf.engines.llama.prefix_cache import PrefixCache
from alignez_gguf.engines.llama.sequences import (
    EXACT_CHUNK_TOKENS,
    UNSTEERED,
    PrefillChunk,
    Sequences,
    SequenceSteering,
    can_be_exact,
)
from alignez_gguf.errors import SteeringError
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.runtime.sampling import Sampler, SamplerThreads
from alignez_gguf.selection.logprobs import log_softmax


@dataclass(frozen=True)
class SequenceRequest:
    """One text to be generated: it depends on these fields alone, never on its neighbours.

    Attributes:
        tokens: the prompt.
        seed: the seed of the draws.
        steering: the strength of a control over the prompt and what follows it.
        gate: steers only where it opens.
        cache_prefix: the prompt will come again, so that its KV cache is worth keeping.
        n_alternatives: report the log-probability of every token, and of this many of the likeliest;
            `None` for no report.
        divergence: report how far steering moved the distribution of every token. Takes a second sequence.
    """

    tokens: Sequence[int]
    sampling: Sampling
    seed: int = 0
    steering: SequenceSteering = UNSTEERED
    gate: Gate | None = None
    cache_prefix: bool = False
    n_alternatives: int | None = None
    divergence: bool = False

    @property
    def n_sequences(self) -> int:
        return 2 if self.divergence else 1


@dataclass(frozen=True)
class TokenReport:
    """A generated token.

    Attributes:
        data: its bytes, which need not be whole characters.
        logprob: its log-probability in nat, before temperature and top-p; `None` where none is wanted.
        alternatives: the likeliest tokens with theirs, best first.
        offset: where it begins in the text, in characters.
        divergence: KL(P_base || P_steered) of the distribution it was drawn from, in nat; `None` where none
            is wanted.
    """

    data: bytes
    logprob: float | None = None
    alternatives: tuple[tuple[bytes, float], ...] = ()
    offset: int = 0
    divergence: float | None = None


@dataclass(frozen=True)
class TextDelta:
    """Text that is certain to be part of the completion, and its tokens where they are reported."""

    text: str
    tokens: tuple[TokenReport, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The completion ends here, because it could not go on."""

    message: str


Event = TextDelta | Completion | Failed
Listener = Callable[[Event], None]
"""Called where the batch is computed: a `TextDelta` each time there is text, then one of the others."""


class QueuedRequest:
    """A request with who listens to it. Cancelling it frees its sequences before the next step."""

    def __init__(self, request: SequenceRequest, listen: Listener) -> None:
        self.request = request
        self.listen = listen
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


Take = Callable[[int], QueuedRequest | None]
"""Given a number of sequences, gives the next waiting request that needs at most that many, or None."""

_PREFILLED = object()


class Batch:
    """Completes requests in the sequences of one context, each with a control and a strength of its own.

    What a request becomes depends on itself alone: to the bit on a CPU with F32, F16 or Q8_0 weights (see
    `sequences`), but for rounding elsewhere.

    Args:
        model: outlives the batch.
        controls: the edits of each control, by the numbers that `SequenceSteering` has.
        n_ctx: the longest prompt and completion together, in tokens.
        n_parallel: the most sequences that are decoded at once.
        n_threads: default: the number of physical cores.
        exact: keep completions independent of each other to the bit where the weights allow that.
        prefill_tokens: the prompt tokens after which a step prefills no more, so that running completions
            never wait long; by default, it prefills all that there is room for.
        prefix_cache: see `Sequences`.

    Raises:
        SteeringError: the edits cannot be applied to this model.
        RuntimeUnavailableError: there are edits, and llama.cpp lacks the patch.
        ModelFileError: there is not enough memory for the sequences.
    """

    def __init__(
        self,
        model: Model,
        controls: Sequence[Edits] = (),
        *,
        n_ctx: int,
        n_parallel: int,
        n_threads: int | None = None,
        exact: bool = True,
        prefill_tokens: float = inf,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.n_ctx = n_ctx
        self.n_parallel = n_parallel
        exact = exact and can_be_exact(model)
        self._pads = exact
        self._sequences = Sequences(
            model,
            n_ctx=n_ctx,
            n_sequences=n_parallel + exact,  # one more to pad a lone token with
            n_threads=n_threads,
            exact=exact,
            controls=controls,
            prefix_cache=prefix_cache,
        )
        self._context = self._sequences.context
        self._threads = SamplerThreads(self._context)
        self._running: list[_Row] = []
        """The rows that the first sequences compute. llama.cpp computes only sequences with neighbouring
        numbers together (`llama_batch_allocr::split_equal` in src/llama-batch.cpp)."""
        self._arriving: RunningSequence | None = None
        self._prefill: Iterator[None] = iter(())
        self._prefill_tokens = prefill_tokens
        self._prefill_left = 0.0

    @property
    def n_running(self) -> int:
        """The number of requests that are being completed."""
        return sum(not row.is_baseline for row in self._running) + (self._arriving is not None)

    def step(self, take: Take) -> None:
        """Prefill some of the prompts that wait, and then decode one token of every running sequence."""
        self._drop_done()
        self._prefill_left = self._prefill_tokens
        while self._prefill_left > 0:
            if self._arriving is None:
                queued = take(self.n_parallel - len(self._running))
                if queued is None:
                    break
                self._arriving = RunningSequence(queued)
                self._prefill = self._prefilled(self._arriving)
            if self._arriving.queued.cancelled:
                self._arriving.close()
                self._arriving = None
            elif next(self._prefill, _PREFILLED) is _PREFILLED:
                self._arriving = None
        if self._running:
            self._decode()
            self._drop_done()

    def stop(self) -> list[QueuedRequest]:
        """Drop all requests, and return those that were not finished."""
        dropped = {row.sequence: None for row in self._running}
        if self._arriving is not None:
            dropped[self._arriving] = None
        self._running, self._arriving = [], None
        for sequence in dropped:
            sequence.close()
        return [sequence.queued for sequence in dropped if not sequence.is_finished]

    def fail(self, message: str) -> None:
        """End all requests with an error, and forget all that was computed."""
        for queued in self.stop():
            queued.listen(Failed(message))
        self._sequences.clear()

    def close(self) -> None:
        """Free the context; nothing may be running."""
        self._threads.close()
        self._sequences.close()

    def _prefilled(self, sequence: RunningSequence) -> Iterator[None]:
        """Compute a prompt, yielding between its chunks; then draw the first token, and join the others."""
        request = sequence.request
        number = len(self._running)
        if number == 1 and self._pads:
            number = 2  # the one that is running may be padded with sequence 1 meanwhile
        steering, base_logits = request.steering, None
        if request.divergence or request.gate is not None:
            baseline = number + 1 if request.divergence else number
            index = yield from self._computed(baseline, request.tokens, UNSTEERED)
            base_logits = self._context.logits(index).copy()
        if request.gate is not None and base_logits is not None:
            try:
                if not request.gate.opens(base_logits):
                    steering = UNSTEERED
            except SteeringError as error:
                sequence.fail(str(error))
                return
        if base_logits is None or request.divergence or steering.strength:
            index = yield from self._computed(number, request.tokens, steering)
        if request.cache_prefix:
            self._sequences.cache_prefix(number)
        sequence.steered = steering.strength > 0
        token = sequence.sampler.sample(self._context, index)
        sequence.take(self._context, index, token, base_logits if request.divergence else None)
        if sequence.is_finished:
            sequence.close()
            return
        for is_baseline in (False, True)[: request.n_sequences]:
            if number != len(self._running):
                self._sequences.copy_sequence(number, len(self._running))
            self._running.append(_Row(sequence, is_baseline))
            number += 1

    def _computed(
        self, number: int, tokens: Sequence[int], steering: SequenceSteering
    ) -> Generator[None, None, int]:
        """Make a sequence hold a prompt, yielding between its chunks; the index of its logits."""
        *first, last = self._sequences.plan(number, tokens, len(tokens) - 1, steering)
        for chunk in first:
            self._compute(number, chunk)
            yield
        self._compute(number, last)
        return last.wanted[-1]

    def _compute(self, number: int, chunk: PrefillChunk) -> None:
        self._sequences.compute(number, chunk)
        # Weights are read for each chunk, however short it is.
        self._prefill_left -= max(len(chunk.tokens), EXACT_CHUNK_TOKENS)

    def _decode(self) -> None:
        """Decode one token of every running sequence."""
        self._sequences.decode([row.sequence.last for row in self._running])
        baselines = {row.sequence: index for index, row in enumerate(self._running) if row.is_baseline}
        own = {index: row.sequence for index, row in enumerate(self._running) if not row.is_baseline}
        drawn = self._threads.sample({index: sequence.sampler for index, sequence in own.items()})
        for index, sequence in own.items():
            baseline = baselines.get(sequence)
            base_logits = None if baseline is None else self._context.logits(baseline)
            sequence.take(self._context, index, drawn[index], base_logits)

    def _drop_done(self) -> None:
        """Close the gaps of sequences that ended, so that the others keep the first numbers."""
        for number in reversed(range(len(self._running))):
            sequence = self._running[number].sequence
            if not (sequence.is_finished or sequence.queued.cancelled):
                continue
            sequence.close()
            last = self._running.pop()
            if number < len(self._running):
                self._sequences.copy_sequence(len(self._running), number)
                self._running[number] = last


class RunningSequence(StreamingCompletion):
    """A request with what has been generated for it. `close` frees its sampler."""

    def __init__(self, queued: QueuedRequest) -> None:
        self.queued = queued
        self.request = queued.request
        sampling = self.request.sampling
        super().__init__(sampling)
        self.is_finished = False
        self.sampler = Sampler(seed=self.request.seed, temperature=sampling.temperature, top_p=sampling.top_p)
        self._reports: list[TokenReport] = []

    def take(self, context: Context, index: int, token: int, base_logits: NDArray[np.float32] | None) -> None:
        """Add a token that was drawn from the logits at `index`.

        `base_logits` [n_vocab] are those of the unsteered model behind the same tokens, for the divergence.
        """
        if context.model.ends_text(token):
            text = self.end()
        else:
            data = context.model.piece(token)
            if self.request.n_alternatives is not None or base_logits is not None:
                self._reports.append(self._report(context, index, token, data, base_logits))
            text = self.add(token, data)
        # With the reports of the tokens that begin in what is shown, or of all where nothing is withheld.
        all_given = self.text.n_given == self.text.n_decoded
        given = [report for report in self._reports if all_given or report.offset < self.text.n_given]
        self._reports = self._reports[len(given) :]
        if text or given:
            self.queued.listen(TextDelta(text, tuple(given)))
        if self.completion is not None:
            self.is_finished = True
            self.queued.listen(self.completion)

    def fail(self, message: str) -> None:
        """End with an error."""
        self.is_finished = True
        self.close()
        self.queued.listen(Failed(message))

    def close(self) -> None:
        self.sampler.close()

    def _report(
        self,
        context: Context,
        index: int,
        token: int,
        data: bytes,
        base_logits: NDArray[np.float32] | None,
    ) -> TokenReport:
        logprobs = log_softmax(context.logits(index))
        alternatives: tuple[tuple[bytes, float], ...] = ()
        if self.request.n_alternatives:
            alternatives = tuple(
                (context.model.piece(int(likely)), float(logprobs[likely]))
                for likely in _likeliest(logprobs, self.request.n_alternatives)
            )
        return TokenReport(
            data=data,
            logprob=None if self.request.n_alternatives is None else float(logprobs[token]),
            alternatives=alternatives,
            offset=self.text.n_decoded,
            divergence=None if base_logits is None else _divergence(log_softmax(base_logits), logprobs),
        )


@dataclass(frozen=True, eq=False)
class _Row:
    """The work of one sequence: a request, or the unsteered model over the same tokens (`is_baseline`)."""

    sequence: RunningSequence
    is_baseline: bool = False


def complete(
    batch: Batch, requests: Sequence[SequenceRequest], on_text: Callable[[int, str], None] | None
) -> Iterator[tuple[int, Completion]]:
    """Complete all requests; each is yielded with its index when it is finished.

    Raises:
        SteeringError: the gate of a request cannot be read.
    """
    finished: deque[tuple[int, Completion]] = deque()

    def listen(index: int, event: Event) -> None:
        if isinstance(event, Completion):
            finished.append((index, event))
        elif isinstance(event, Failed):
            raise SteeringError(event.message)
        elif on_text is not None and event.text:
            on_text(index, event.text)

    waiting = deque(QueuedRequest(request, partial(listen, index)) for index, request in enumerate(requests))

    def take(room: int) -> QueuedRequest | None:
        return waiting.popleft() if waiting and room and not finished else None

    try:
        while waiting or batch.n_running:
            batch.step(take)
            while finished:
                yield finished.popleft()
    finally:
        batch.stop()


def _likeliest(logprobs: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the likeliest tokens, best first, without sorting the whole vocabulary."""
    likeliest = np.argpartition(-logprobs, min(count, len(logprobs) - 1))[:count]
    return likeliest[np.argsort(-logprobs[likeliest], kind="stable")]


def _divergence(base: NDArray[np.float32], steered: NDArray[np.float32]) -> float:
    """Return KL(P_base || P_steered) in nat, of log-probabilities [n_vocab]."""
    possible = np.isfinite(base)  # some models never let a token be drawn
    terms = np.exp(base[possible], dtype=np.float64) * (base[possible] - steered[possible])
    return max(0.0, float(np.sum(terms)))
