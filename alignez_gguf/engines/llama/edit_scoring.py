"""Measures many edits of a GGUF model along the same answers, for the search.

The prompts are computed once, unsteered, and stay in the KV cache. Where only the last prompt token and what
follows it is steered, an edit costs one token per prompt and those of the answer. Needs the patched runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.closing import Closing
from alignez_gguf.control.edits import Edits
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.tokens import steered_tokens
from alignez_gguf.errors import ModelFileError, QueryError
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.selection.logprobs import log_softmax
from alignez_gguf.selection.scoring import ANSWER_TOKENS

_BATCH = 256
"""The most tokens that are computed together, unless a prompt and its answer have more."""
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ in llama.cpp's src/llama-cparams.h


@dataclass(frozen=True)
class _Text:
    """A prompt and the beginning of an answer, as tokens; the prompt is that of sequence `sequence`."""

    sequence: int
    prompt: list[int]
    answer: list[int]


class LlamaEditScorer(Closing):
    """Measures the likelihoods of the same answers under one edit after the other.

    Args:
        model: outlives this object.
        passages: prompts and their answers; passages with the same prompt share its KV cache.
        n_threads: default: the number of physical cores.

    Raises:
        QueryError: a prompt has fewer than two tokens, an answer has none, or there are more prompts than
            sequences.
        ModelFileError: the model cannot drop the end of a sequence from its cache.
    """

    def __init__(self, model: Model, passages: Sequence[Passage], *, n_threads: int | None = None) -> None:
        sequences = {
            prompt: i for i, prompt in enumerate(dict.fromkeys(passage.prompt for passage in passages))
        }
        self._texts = [
            _Text(sequences[passage.prompt], *steered_tokens(model.tokenize, passage, ANSWER_TOKENS))
            for passage in passages
        ]
        prompts = list({text.sequence: text.prompt for text in self._texts}.values())
        count = len(prompts)
        if count >= _MAX_SEQUENCES:
            raise QueryError(
                f"{count} prompts are too many to score at once; give {_MAX_SEQUENCES - 1} at most"
            )
        shared = _common_prefix([prompt[:-1] for prompt in prompts])
        longest = max(len(text.prompt) + len(text.answer) for text in self._texts)
        n_batch = max(_BATCH, longest)
        self._whole = count
        """The sequence in which prompts are computed again, steered, for the scope `all`."""
        self._context = Context(
            model,
            n_ctx=shared + sum(len(prompt) - shared for prompt in prompts) + n_batch,
            n_sequences=count + 1,
            n_batch=n_batch,
            n_threads=n_threads,
            unified=True,
        )
        try:
            self._read_prompts(prompts, shared)
        except BaseException:
            self._context.close()
            raise

    def log_likelihoods(
        self, edits: Edits, passages: Sequence[int], *, scope: Scope = GENERATION
    ) -> NDArray[np.float64]:
        """Return log P(answer | prompt) in nat, [n_passages], over at most `ANSWER_TOKENS` tokens each.

        Args:
            edits: by layer; at strength 1.
            passages: the numbers of the passages.
            scope: the tokens that are edited.

        Raises:
            SteeringError: the edits do not fit the model.
        """
        texts = [self._texts[number] for number in passages]
        bindings.set_edits(self._context.pointer, edits)
        try:
            chunks = self._chunks(texts, scope)
            values = [value for chunk in chunks for value in self._computed(chunk, edits, scope)]
            return np.array(values)
        finally:
            bindings.set_edits(self._context.pointer, {})

    def close(self) -> None:
        self._context.close()

    def _computed(self, texts: Sequence[_Text], edits: Edits, scope: Scope) -> Iterator[float]:
        """Yield the log-likelihoods of texts that are computed together; leave the cache as it was."""
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        outputs: list[bool] = []
        for text in texts:
            start, sequence = self._start(text, scope), self._sequence(text, scope)
            computed = text.prompt[start:] + text.answer[:-1]
            tokens += computed
            positions += range(start, start + len(computed))
            sequences += [sequence] * len(computed)
            outputs += [index >= len(text.prompt) - 1 - start for index in range(len(computed))]
            if edits:
                first, end = scope.positions(len(text.prompt))
                bindings.set_strength(self._context.pointer, 1.0, sequence=sequence, first=first, end=end)
        self._context.decode(tokens, positions, sequences, outputs)
        row = 0
        for text in texts:
            row += len(text.prompt) - 1 - self._start(text, scope)
            yield sum(
                float(log_softmax(self._context.logits(row + index))[token])
                for index, token in enumerate(text.answer)
            )
            row += len(text.answer)
            self._truncate(self._sequence(text, scope), self._start(text, scope))

    def _sequence(self, text: _Text, scope: Scope) -> int:
        return self._whole if scope.kind == "all" else text.sequence

    def _start(self, text: _Text, scope: Scope) -> int:
        """Return the first position that is computed for an edit."""
        return 0 if scope.kind == "all" else len(text.prompt) - 1

    def _chunks(self, texts: Sequence[_Text], scope: Scope) -> Iterator[list[_Text]]:
        """Yield texts that are computed together: of different sequences, with at most `n_batch` tokens."""
        chunk: list[_Text] = []
        used = 0
        for text in texts:
            count = len(text.prompt) - 1 - self._start(text, scope) + len(text.answer)
            taken = {self._sequence(other, scope) for other in chunk}
            if chunk and (used + count > self._context.n_batch or self._sequence(text, scope) in taken):
                yield chunk
                chunk, used = [], 0
            chunk.append(text)
            used += count
        if chunk:
            yield chunk

    def _read_prompts(self, prompts: Sequence[list[int]], shared: int) -> None:
        """Compute all prompts but their last tokens; the first `shared` tokens, which all have, only once."""
        self._read(0, prompts[0][:shared], 0)
        for sequence, prompt in enumerate(prompts):
            if sequence > 0:
                self._context.copy_sequence(0, sequence)
                self._truncate(sequence, shared)
            self._read(sequence, prompt[shared:-1], shared)

    def _read(self, sequence: int, tokens: Sequence[int], position: int) -> None:
        for start in range(0, len(tokens), self._context.n_batch):
            part = tokens[start : start + self._context.n_batch]
            first = position + start
            self._context.decode(
                part,
                np.arange(first, first + len(part)),
                np.full(len(part), sequence),
                np.zeros(len(part), np.int8),
            )

    def _truncate(self, sequence: int, length: int) -> None:
        if not self._context.truncate_sequence(sequence, length):
            raise ModelFileError(
                "this model cannot drop the end of a prompt from its cache, which the search needs; "
                "use --recipe paper"
            )


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = min(len(sequence) for sequence in sequences)
    for position in range(length):
        if len({sequence[position] for sequence in sequences}) > 1:
            return position
    return length
