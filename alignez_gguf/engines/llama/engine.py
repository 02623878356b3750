"""Runs a GGUF model through llama.cpp: many sequences at once, and hidden states of texts.

Needs no patch, except to steer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.closing import Closing
from alignez_gguf.control.edits import Edits
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.base import DEFAULT_N_PARALLEL, Completion, GenerationRequest, Passage, Sampling
from alignez_gguf.engines.llama.batching import Batch, SequenceRequest, complete
from alignez_gguf.engines.llama.edit_scoring import LlamaEditScorer
from alignez_gguf.engines.llama.prefix_cache import PrefixCache
from alignez_gguf.engines.llama.sequences import UNSTEERED, Sequences, SequenceSteering, can_be_exact
from alignez_gguf.engines.tokens import passage_tokens, prompt_tokens, response_tokens
from alignez_gguf.errors import SteeringError
from alignez_gguf.readout import Hook, Readout
from alignez_gguf.runtime.context import CELLS, Context
from alignez_gguf.runtime.layer_reader import LayerReader
from alignez_gguf.runtime.model import Model
from alignez_gguf.selection.logprobs import log_softmax

_DEFAULT_CONTEXT = 1024
_CACHE_SHARE = 0.6
"""The KV cache of all sequences together takes at most this share of the model's size,"""
_LEAST_CACHE_BYTES = 256 << 20
"""or this much where that is more; fewer sequences run in parallel where it is tight."""

_TILE = 4
"""Sequences that the kernels of K-quants compute at once: three take longer than four."""

_BATCHES_FROM = 16
"""Sequences in parallel from which on the weights are arranged for many tokens at once."""

_ANY_TEXT = "a b c"
"""A text of a few tokens, computed in one chunk to learn the graph."""


class LlamaEngine(Closing):
    """A GGUF model that generates texts and reads hidden states.

    The completion of a request depends neither on `n_parallel` nor on other requests: to the bit on a CPU
    with F32, F16 or Q8_0 weights (see `sequences`), but for rounding with other quantizations and on GPUs.

    Args:
        model_path: the GGUF file.
        n_ctx: the longest prompt and completion together, in tokens. Default: 1024, or what the model was
            trained for if that is less.
        n_parallel: the most sequences that are decoded at once; fewer where the KV cache is tight.
        n_threads: default: the number of physical cores.
        n_gpu_layers: how many layers a GPU holds; -1 for all, if there is one.
        exact: keep completions independent of each other to the bit; slows a sequence that runs alone.

    Raises:
        ModelFileError: the model cannot be loaded.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        *,
        n_ctx: int | None = None,
        n_parallel: int = DEFAULT_N_PARALLEL,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        exact: bool = True,
    ) -> None:
        self.model = Model(
            model_path, n_gpu_layers=n_gpu_layers, optimize_for_batches=n_parallel >= _BATCHES_FROM
        )
        self.n_ctx = n_ctx or min(_DEFAULT_CONTEXT, self.model.n_ctx_train)
        self.n_parallel = max(1, n_parallel)
        self._cache_bytes = max(_LEAST_CACHE_BYTES, int(_CACHE_SHARE * self.model.n_bytes))
        self._n_threads = n_threads
        self._exact = exact
        # A GPU computes a prompt about as fast as it is copied.
        self._prefix_cache = None if self.model.uses_gpu else PrefixCache()
        self._edits: Edits = {}
        self._scope = Scope()
        self._gate: Gate | None = None
        self._generating = False
        # One of both at a time, unless a text is read while others are written: each takes memory.
        self._reading: Sequences | None = None
        """One sequence, which goes from text to text and keeps what they have in common."""
        self._batch: Batch | None = None

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    def set_edits(self, edits: Edits, scope: str | Scope = "generation", gate: Gate | None = None) -> None:
        """Steer requests with a strength above 0 by these edits; no edits make them all unsteered.

        With a gate, only those for which it opens.

        Raises:
            SteeringError: the edits do not fit the model, or the scope is unknown.
            RuntimeUnavailableError: llama.cpp lacks the patch.
        """
        scope = Scope.parse(scope)
        if gate is not None:
            gate.check_fits(self.model.n_vocab)
        self._require_idle()
        self._close_batch()
        self._stop_reading()
        with Context(self.model, n_ctx=1, n_batch=1, edits=edits):
            pass  # a small one, to see that llama.cpp takes them
        self._edits = {layer: edit for layer, edit in edits.items() if edit.decision != "none"}
        self._scope = scope
        self._gate = gate

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete all requests; see `Engine`. Prompts are checked before anything is computed.

        The iterator has to be finished or closed before the next call computes anything.
        """
        tokenized = [
            SequenceRequest(
                tokens,
                sampling,
                request.seed,
                self._steering(request.strength, tokens),
                self._gate if request.strength else None,
                request.keep_prompt,
            )
            for request in requests
            for tokens in [self._tokens(request.prompt, sampling.max_tokens)]
        ]
        return self._complete(tokenized, on_text)

    def steered(self, passages: Sequence[Passage]) -> LlamaEditScorer:
        """Return a scorer of many edits along the same answers; see `LlamaEditScorer`."""
        self._close_batch()
        self._stop_reading()
        return LlamaEditScorer(self.model, passages, n_threads=self._n_threads)

    @property
    def hooks(self) -> Collection[Hook]:
        """The hidden states that can be read of every layer of this architecture."""
        return self._knowing_reader().hooks

    def activations(
        self, passages: Sequence[Passage], readouts: Sequence[Readout]
    ) -> Iterator[NDArray[np.float16]]:
        """Yield the hidden states of each passage; see `Engine`. Never steered."""
        split = [passage_tokens(self.model.tokenize, passage, self.n_ctx) for passage in passages]
        return (self._activations(tokens, first, readouts) for tokens, first in split)

    def response_logprobs(
        self, passages: Sequence[Passage], *, max_tokens: int | None = None
    ) -> Iterator[float]:
        """Yield log P(response | prompt) of each passage; see `Engine`. Never steered.

        What passages have in common with the one before is computed once.
        """
        split = [
            response_tokens(self.model.tokenize, passage, self.n_ctx, max_tokens) for passage in passages
        ]
        return (self._response_logprob(tokens, first) for tokens, first in split)

    def next_token_logprobs(
        self, prompts: Sequence[str], strength: float = 0.0
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the log-probabilities of the token after each prompt; see `Engine`."""
        split = [self._tokens(prompt) for prompt in prompts]
        steering = [self._steering(strength, tokens) for tokens in split]
        return map(self._next_token_logprobs, split, steering)

    def close(self) -> None:
        """Free the model and everything that was made of it."""
        self._generating = False
        self._close_batch()
        self._stop_reading()
        if self._prefix_cache is not None:
            self._prefix_cache.close()
        self.model.close()

    @cached_property
    def _reader(self) -> LayerReader:
        return LayerReader(self.info)

    def _ready_to_read(self) -> Sequences:
        """Open the sequence in which texts are read, and return it."""
        self._close_batch()
        if self._reading is None:
            self._reading = Sequences(
                self.model,
                n_ctx=self.n_ctx,
                n_threads=self._n_threads,
                exact=self._exact and can_be_exact(self.model),
                controls=self._controls,
                prefix_cache=self._prefix_cache,
                on_node=self._reader.on_node,
            )
        return self._reading

    def _knowing_reader(self) -> LayerReader:
        """Return the reader of hidden states once it has learned the graph."""
        if not self._reader.knows_graph:
            tokens = self._tokens(_ANY_TEXT)
            sequences = self._ready_to_read()
            self._reader.learn(lambda: sequences.prefill(0, tokens))
        return self._reader

    def _complete(
        self, requests: Sequence[SequenceRequest], on_text: Callable[[int, str], None] | None
    ) -> Iterator[tuple[int, Completion]]:
        self._require_idle()
        if not requests:
            return
        batch = self._open_batch(requests)
        self._generating = True
        try:
            yield from complete(batch, requests, on_text)
        finally:
            self._generating = False

    def _open_batch(self, requests: Sequence[SequenceRequest]) -> Batch:
        """Return a batch whose sequences are long enough for these requests, and as many as they can use."""
        self._stop_reading()
        longest = max(len(request.tokens) + request.sampling.max_tokens for request in requests)
        affordable = self._cache_bytes // (self._cells(longest) * self.model.cache_bytes)
        if _TILE < affordable < self.n_parallel:
            affordable -= affordable % _TILE
        wanted = max(len(requests), 2)  # a second one soon, as in a chat side by side, keeps what is computed
        n_parallel = max(1, min(self.n_parallel, affordable, wanted))
        batch = self._batch
        if batch is None or batch.n_ctx < longest or batch.n_parallel < n_parallel:
            self._close_batch()
            batch = self._batch = Batch(
                self.model,
                self._controls,
                n_ctx=self._cells(longest),
                n_parallel=n_parallel,
                n_threads=self._n_threads,
                exact=self._exact,
                prefix_cache=self._prefix_cache,
            )
        return batch

    def _cells(self, longest: int) -> int:
        """Return the cells of a sequence: for the longest text, or for the whole context if memory allows."""
        affordable = self.n_parallel * self.n_ctx * self.model.cache_bytes <= self._cache_bytes
        return self.n_ctx if affordable else min(self.n_ctx, -(-longest // CELLS) * CELLS)

    def _close_batch(self) -> None:
        """Free the sequences in which completions are written, unless some are."""
        if self._batch is not None and not self._generating:
            self._batch.close()
            self._batch = None

    def _stop_reading(self) -> None:
        """Free the sequence to read in."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    @property
    def _controls(self) -> list[Edits]:
        return [self._edits] if self._edits else []

    def _steering(self, strength: float, tokens: Sequence[int]) -> SequenceSteering:
        if strength == 0:
            return UNSTEERED
        if not self._edits:
            raise SteeringError(f"strength {strength} is asked for, but no edit is set; call set_edits first")
        return SequenceSteering(strength, *self._scope.positions(len(tokens)))

    def _tokens(self, prompt: str, n_new: int = 0) -> list[int]:
        return prompt_tokens(self.model.tokenize, prompt, self.n_ctx, n_new)

    def _require_idle(self) -> None:
        if self._generating:
            raise RuntimeError("the engine is generating; finish or close that iterator first")

    def _activations(
        self, tokens: Sequence[int], first: int, readouts: Sequence[Readout]
    ) -> NDArray[np.float16]:
        sequences, reader = self._ready_to_read(), self._knowing_reader()
        with reader.reading(readouts):
            # From `first` on whatever is read: the last layer computes only tokens with logits, and how many
            # they are decides how it rounds.
            for chunk in sequences.plan(0, tokens, first):
                if chunk.n_wanted:
                    reader.arm(chunk.n_wanted)
                sequences.compute(0, chunk)
            return reader.take()

    def _response_logprob(self, tokens: Sequence[int], first: int) -> float:
        """Return the sum of the log-probabilities of the tokens from `first` on, in nat."""
        sequences, total = self._ready_to_read(), 0.0
        for chunk in sequences.plan(0, tokens[:-1], first - 1):
            sequences.compute(0, chunk)
            for index in chunk.wanted:
                logprobs = log_softmax(sequences.context.logits(index))
                total += float(logprobs[tokens[chunk.begin + index + 1]])
        return total

    def _next_token_logprobs(self, tokens: Sequence[int], steering: SequenceSteering) -> NDArray[np.float32]:
        sequences = self._ready_to_read()
        if steering.strength and self._gate is not None:
            index = sequences.prefill(0, tokens)
            if not self._gate.opens(sequences.context.logits(index)):
                return log_softmax(sequences.context.logits(index))
        return log_softmax(sequences.context.logits(sequences.prefill(0, tokens, steering)))
