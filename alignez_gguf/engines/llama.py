"""Runs a GGUF model through llama.cpp: many texts at once, and what the layers make of them.

Needs no patch, except to steer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.edits import Edits
from alignez_gguf.engines import (
    TEXTS_AT_ONCE,
    Completion,
    GenerationRequest,
    Hook,
    Passage,
    Readout,
    Sampling,
)
from alignez_gguf.engines.batching import Job, generate
from alignez_gguf.engines.passages import passage_tokens, prompt_tokens, response_tokens
from alignez_gguf.engines.prompt_cache import PromptCache
from alignez_gguf.engines.slots import (
    EXACT_PIECE,
    FAST_PIECE,
    UNSTEERED,
    Slots,
    Treatment,
    can_be_exact,
    company_needed_from,
    in_whole_rows,
)
from alignez_gguf.engines.steered import SteeredPassages, log_softmax
from alignez_gguf.errors import SteeringError
from alignez_gguf.gate import Gate
from alignez_gguf.model_info import ModelInfo
from alignez_gguf.runtime import library
from alignez_gguf.runtime.context import CELLS, Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.runtime.reader import LayerReader
from alignez_gguf.scope import Scope

_DEFAULT_CONTEXT = 1024
_CACHE_SHARE = 0.6
"""All texts that grow together keep at most so much of the model's size in the KV cache,"""
_LEAST_CACHE_BYTES = 256 << 20
"""or so much where that is more; fewer texts grow at once where it is tight."""


_MANY = 16
"""Texts that may grow at once, from which on the weights are arranged for that."""

_ANY_TEXT = "a b c"
"""To see the graph; of a few tokens, which are computed in one piece."""


class LlamaEngine:
    """A GGUF model that writes and reads texts.

    The completion of a request depends neither on `n_parallel` nor on other requests: to the bit on a CPU
    with F32, F16 or Q8_0 weights (see `slots`), but for rounding with other quantizations and on GPUs.

    Args:
        model_path: the GGUF file.
        n_ctx: the longest prompt and completion together, in tokens. Default: 1024, or what the model was
            trained for if that is less.
        n_parallel: the most texts that grow at once; fewer do where their KV cache would take too much.
        n_threads: default: the number of physical cores.
        n_gpu_layers: how many layers a GPU holds; -1 for all, if there is one.
        exact: keep completions independent of each other to the bit; slows a long text that grows alone.

    Raises:
        ModelFileError: the model cannot be loaded.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        *,
        n_ctx: int | None = None,
        n_parallel: int = TEXTS_AT_ONCE,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        exact: bool = True,
    ) -> None:
        self.model = Model(model_path, n_gpu_layers=n_gpu_layers, optimize_for_batches=n_parallel >= _MANY)
        self.n_ctx = n_ctx or min(_DEFAULT_CONTEXT, self.model.n_ctx_train)
        self.n_parallel = max(1, n_parallel)
        self._cache_bytes = max(_LEAST_CACHE_BYTES, int(_CACHE_SHARE * self.model.n_bytes))
        self._n_threads = n_threads
        self._exact = exact and can_be_exact(self.model)
        # A GPU computes a prompt about as fast as it is copied.
        self._prompts = None if self.model.uses_gpu else PromptCache()
        self._edits: Edits = {}
        self._scope = Scope()
        self._gate: Gate | None = None
        self._generating = False
        # One of both at a time, unless a text is read while others grow: each takes memory.
        self._reading: Slots | None = None
        """A sequence that goes from prompt to prompt and keeps what they have in common, and a second one for
        another response."""
        self._writing: Slots | None = None
        """The sequences in which completions grow."""

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
        self._stop_writing()
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
        jobs = [
            Job(
                index,
                tokens,
                request.seed,
                self._treatment(request.strength, tokens),
                request.keep_prompt,
                self._gate,
            )
            for index, request in enumerate(requests)
            for tokens in [self._tokens(request.prompt, sampling.max_tokens)]
        ]
        longest = max((len(job.tokens) for job in jobs), default=0) + sampling.max_tokens
        return self._alone(lambda: self._complete(jobs, longest, sampling, on_text))

    def steered(self, passages: Sequence[Passage]) -> SteeredPassages:
        """Prompts and answers whose likelihood is asked for under many edits; see `SteeredPassages`."""
        self._stop_writing()
        self._stop_reading()
        return SteeredPassages(self.model, passages, n_threads=self._n_threads)

    @property
    def hooks(self) -> Collection[Hook]:
        """What can be read of every layer of this architecture."""
        return self._knowing_reader().hooks

    def activations(
        self, passages: Sequence[Passage], readouts: Sequence[Readout]
    ) -> Iterator[NDArray[np.float16]]:
        """What every layer makes of each passage; see `Engine`. Never steered."""
        split = [passage_tokens(self.model.tokenize, passage, self.n_ctx) for passage in passages]
        return (self._activations(tokens, first, readouts) for tokens, first in split)

    def response_logprobs(
        self, passages: Sequence[Passage], *, max_tokens: int | None = None
    ) -> Iterator[float]:
        """log P(response | prompt) of each passage; see `Engine`. Never steered.

        What passages have in common with the one before is computed once; two responses to one prompt, of
        as many tokens, are computed together where the prompt has just been read.
        """
        split = [
            response_tokens(self.model.tokenize, passage, self.n_ctx, max_tokens) for passage in passages
        ]
        return self._response_logprobs(split)

    def next_token_logprobs(
        self, prompts: Sequence[str], strength: float = 0.0
    ) -> Iterator[NDArray[np.float32]]:
        """The log-probabilities of the token after each prompt; see `Engine`."""
        jobs = [
            (tokens, self._treatment(strength, tokens))
            for prompt in prompts
            for tokens in [self._tokens(prompt)]
        ]
        return (self._logprobs(tokens, treatment) for tokens, treatment in jobs)

    def close(self) -> None:
        """Free the model and everything that was made of it."""
        self._generating = False
        self._stop_writing()
        self._stop_reading()
        if self._prompts is not None:
            self._prompts.close()
        self.model.close()

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _reader(self) -> LayerReader:
        return LayerReader(self.info)

    def _ready_to_read(self) -> Slots:
        """The sequences to read in."""
        self._stop_writing()
        if self._reading is None:
            fits = 2 * self.n_ctx * self.model.cache_bytes <= self._cache_bytes
            n_sequences = 2 if fits and self.model.supports_kv_truncation else 1
            self._reading = self._slots(n_sequences, self.n_ctx, on_node=self._reader.on_node)
        return self._reading

    def _knowing_reader(self) -> LayerReader:
        """The reader of the sequence to read in, which has seen the graph."""
        if not self._reader.knows_graph:
            tokens = self._tokens(_ANY_TEXT)
            slots = self._ready_to_read()
            self._reader.learn(lambda: slots.prefill(0, tokens))
        return self._reader

    def _complete(
        self,
        jobs: Sequence[Job],
        longest: int,
        sampling: Sampling,
        on_text: Callable[[int, str], None] | None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete jobs of at most `longest` tokens each in sequences that are long enough."""
        affordable = self._cache_bytes // (self._cells(longest) * self.model.cache_bytes)
        if affordable < self.n_parallel:
            affordable = in_whole_rows(affordable)
        wanted = max(len(jobs), 2)  # a second one soon, as in a chat side by side, keeps what is computed
        n_parallel = max(1, min(self.n_parallel, affordable, wanted))
        n_sequences = max(n_parallel, 2) if self._exact else n_parallel
        self._stop_reading()
        slots = self._writing
        if slots is None or slots.context.n_ctx < longest or slots.context.n_sequences < n_sequences:
            self._stop_writing()
            company_from = company_needed_from(self.info.quantization) if self._exact else None
            slots = self._writing = self._slots(n_sequences, self._cells(longest), company_from)
        return generate(slots, n_parallel, jobs, sampling, on_text)

    def _cells(self, longest: int) -> int:
        """Of a sequence: what the longest text needs, or all of the context where there is room for that."""
        affordable = self.n_parallel * self.n_ctx * self.model.cache_bytes <= self._cache_bytes
        return self.n_ctx if affordable else min(self.n_ctx, -(-longest // CELLS) * CELLS)

    def _stop_writing(self) -> None:
        """Free the sequences in which completions grow, unless they do."""
        if self._writing is not None and not self._generating:
            self._writing.context.close()
            self._writing = None

    def _stop_reading(self) -> None:
        """Free the sequences to read in."""
        if self._reading is not None:
            self._reading.context.close()
            self._reading = None

    def _slots(
        self, n_sequences: int, n_ctx: int, company_from: int | None = None, on_node: Any = None
    ) -> Slots:
        piece = EXACT_PIECE if self._exact else FAST_PIECE
        context = Context(
            self.model,
            n_ctx=n_ctx,
            n_sequences=n_sequences,
            n_batch=max(piece, n_sequences),
            n_threads=self._n_threads,
            on_node=on_node,
            edits=self._edits,
        )
        return Slots(
            context, piece=piece, company_from=company_from, steer=self._steer, prompts=self._prompts
        )

    def _steer(self, context: Context, slot: int, treatment: Treatment) -> None:
        if self._edits:
            library.set_strength(
                context.pointer,
                treatment.strength,
                sequence=slot,
                first=treatment.first,
                end=treatment.end,
            )

    def _treatment(self, strength: float, tokens: Sequence[int]) -> Treatment:
        if strength == 0:
            return UNSTEERED
        if not self._edits:
            raise SteeringError(f"strength {strength} is asked for, but no edit is set; call set_edits first")
        return Treatment(strength, *self._scope.positions(len(tokens)))

    def _tokens(self, prompt: str, n_new: int = 0) -> list[int]:
        return prompt_tokens(self.model.tokenize, prompt, self.n_ctx, n_new)

    def _alone(
        self, complete: Callable[[], Iterator[tuple[int, Completion]]]
    ) -> Iterator[tuple[int, Completion]]:
        """Keep a second call from writing into the sequences of one that is not finished."""
        self._require_idle()
        completions = complete()
        self._generating = True
        try:
            yield from completions
        finally:
            self._generating = False

    def _require_idle(self) -> None:
        if self._generating:
            raise RuntimeError("the engine is generating; finish or close that iterator first")

    def _activations(
        self, tokens: Sequence[int], first: int, readouts: Sequence[Readout]
    ) -> NDArray[np.float16]:
        slots, reader = self._ready_to_read(), self._knowing_reader()
        with reader.reading(readouts):
            # From `first` on whatever is read: the last layer computes only tokens with logits, and how many
            # they are decides how it rounds.
            for piece in slots.plan(0, tokens, first):
                if piece.n_wanted:
                    reader.arm(piece.n_wanted)
                slots.compute(0, piece)
            return reader.take()

    def _response_logprobs(self, texts: Sequence[tuple[Sequence[int], int]]) -> Iterator[float]:
        """Of each text and the index of its first token of the response."""
        start = 0
        while start < len(texts):
            group = texts[start : start + 2]
            if not self._can_be_together(group):
                group = group[:1]
            yield from self._sums([tokens for tokens, _ in group], group[0][1])
            start += len(group)

    def _can_be_together(self, texts: Sequence[tuple[Sequence[int], int]]) -> bool:
        """Whether these are two equally long responses to a prompt that is computed, or loaded now.

        Not those of a single token, which is computed alone in the last layer, by another kernel than two.
        """
        slots = self._ready_to_read()
        if len(texts) == 1 or slots.context.n_sequences == 1:
            return False
        (tokens, first), (others, others_first) = texts
        alike = len(tokens) == len(others) and first == others_first and tokens[:first] == others[:first]
        fitting = 1 < len(tokens) - first <= slots.context.n_batch // 2
        return alike and fitting and slots.recall(0, tokens[: first - 1])

    def _sums(self, texts: Sequence[Sequence[int]], first: int) -> list[float]:
        """Of the log-probabilities of the tokens from `first` on, of texts that are equally long."""
        slots, sums = self._ready_to_read(), [0.0] * len(texts)
        for slot in range(1, len(texts)):
            slots.move(0, slot)  # or it would go on from where its own former text differs
        plans = [slots.plan(slot, tokens[:-1], first - 1) for slot, tokens in enumerate(texts)]
        for pieces in zip(*plans, strict=True):
            slots.compute_together(pieces)
            for number, (piece, tokens) in enumerate(zip(pieces, texts, strict=True)):
                before = number * len(piece.tokens)
                for index in piece.wanted:
                    following = tokens[piece.begin + index + 1]
                    sums[number] += float(log_softmax(slots.context.logits(before + index))[following])
        return sums

    def _logprobs(self, tokens: Sequence[int], treatment: Treatment) -> NDArray[np.float32]:
        slots = self._ready_to_read()
        index = slots.prefill(0, tokens, treatment, self._gate)
        return log_softmax(slots.context.logits(index))
