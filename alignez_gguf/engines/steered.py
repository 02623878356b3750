"""The steered model as the selection measures it: many edits over the same prompts.

Only the last prompt token and what follows it is steered (scope `generation`), so that the prompts are
computed once, unsteered, and an edit costs one token per query. Needs the patched runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.edits import Edits
from alignez_gguf.errors import ModelFileError, QueryError
from alignez_gguf.runtime import library
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.selection import Divergence

DIVERGENCE_QUERIES = 24
"""Queries over which the divergence is measured."""
_BATCH = 512


@dataclass(frozen=True)
class _Query:
    prompt: list[int]
    answer: list[int]

    @property
    def n_rows(self) -> int:
        """Distributions along the answer: for each of its tokens, and for what follows it."""
        return len(self.answer) + 1


class SteeredPrompts:
    """Prompts whose keys and values stay in the cache while edits come and go.

    Every query has two sequences over one prompt cache: one for the base model, one that is steered.

    Args:
        model: outlives this object.
        prompts: plain prompts, one for each query.
        answers: the base model's own answers to them.
        n_threads: default: the number of physical cores.

    Raises:
        QueryError: a prompt has fewer than two tokens.
        ModelFileError: the model cannot drop the end of a sequence from its cache.
    """

    def __init__(
        self, model: Model, prompts: Sequence[str], answers: Sequence[str], *, n_threads: int | None = None
    ) -> None:
        self._queries = [_query(model, *texts) for texts in zip(prompts, answers, strict=True)]
        count = len(self._queries)
        # llama.cpp wants room for a token of every sequence.
        n_batch = max(_BATCH, 2 * count, *(2 * query.n_rows for query in self._queries))
        self._context = Context(
            model,
            n_ctx=sum(len(query.prompt) for query in self._queries) + n_batch,
            n_sequences=2 * count,
            n_batch=n_batch,
            n_threads=n_threads,
            unified=True,
        )
        self._read_prompts()

    def first_token_logprobs(self, edits: Edits) -> NDArray[np.float32]:
        """[n_queries, n_vocab]: log-probabilities of the first token of the answer under `edits`."""
        self._set(edits)
        queries = range(len(self._queries))
        self._decode([(query, self._steered(query), 1) for query in queries])
        return np.stack([log_softmax(self._context.logits(query)) for query in queries])

    def divergence(self, edits: Edits) -> Divergence:
        """KL(P_base || P_steered), teacher-forced along the base model's answers and to what follows them."""
        self._set(edits)
        answers: list[list[float]] = []
        for chunk in self._divergence_chunks():
            runs = [
                (q, sequence, self._queries[q].n_rows) for q in chunk for sequence in (q, self._steered(q))
            ]
            self._decode(runs)
            row = 0
            for query in chunk:
                length = self._queries[query].n_rows
                answers.append(
                    [self._row_divergence(base, base + length) for base in range(row, row + length)]
                )
                row += 2 * length
        return Divergence(
            per_token=float(np.mean(np.concatenate(answers))),
            after_first=float(np.mean([sum(answer[1:]) for answer in answers])),
        )

    def _row_divergence(self, base_row: int, steered_row: int) -> float:
        base = log_softmax(self._context.logits(base_row))
        steered = log_softmax(self._context.logits(steered_row))
        return float(np.sum(np.exp(base) * (base - steered), dtype=np.float64))

    def close(self) -> None:
        self._context.close()

    def __enter__(self) -> SteeredPrompts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _steered(self, query: int) -> int:
        return len(self._queries) + query

    def _set(self, edits: Edits) -> None:
        pointer = self._context.pointer
        library.set_edits(pointer, edits, self._context.model.info.n_embd)
        if edits:
            for query in range(len(self._queries)):
                library.set_strength(pointer, 0.0, sequence=query)

    def _decode(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """Compute the last prompt token and what follows it, for (query, sequence, number of tokens) each.

        The cache is as it was afterwards; the logits of all tokens are at hand, in order.
        """
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for index, sequence, length in runs:
            query = self._queries[index]
            last = len(query.prompt) - 1
            tokens += [query.prompt[last], *query.answer[: length - 1]]
            positions += range(last, last + length)
            sequences += [sequence] * length
        self._context.decode(tokens, positions, sequences, np.ones(len(tokens), np.int8))
        for index, sequence, _ in runs:
            if not self._context.truncate_sequence(sequence, len(self._queries[index].prompt) - 1):
                raise ModelFileError(
                    "this model cannot drop the end of a prompt from its cache, which the selection needs; "
                    "use --recipe paper"
                )

    def _divergence_chunks(self) -> Iterator[list[int]]:
        """Queries whose answers fit into one batch together, base and steered."""
        chunk: list[int] = []
        used = 0
        for index in range(min(DIVERGENCE_QUERIES, len(self._queries))):
            needed = 2 * self._queries[index].n_rows
            if chunk and used + needed > self._context.n_batch:
                yield chunk
                chunk, used = [], 0
            chunk.append(index)
            used += needed
        if chunk:
            yield chunk

    def _read_prompts(self) -> None:
        """Compute all prompts but their last tokens; what they have in common only once."""
        bodies = [query.prompt[:-1] for query in self._queries]
        shared = _common_prefix(bodies)
        self._read(0, bodies[0][:shared], 0)
        for index, body in enumerate(bodies):
            if index > 0:
                self._context.copy_sequence(0, index)
                self._context.truncate_sequence(index, shared)
            self._read(index, body[shared:], shared)
        for index in range(len(bodies)):
            self._context.copy_sequence(index, self._steered(index))

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


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities [n_vocab] of `logits` [n_vocab]."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted))), np.float32)


def _query(model: Model, prompt: str, answer: str) -> _Query:
    prompt_tokens = model.tokenize(prompt)
    if len(prompt_tokens) < 2:
        raise QueryError(f"the prompt {prompt!r} is too short to steer its answer; give a longer query")
    both = model.tokenize(prompt + answer)
    return _Query(prompt_tokens, both[len(prompt_tokens) :])


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = min(len(sequence) for sequence in sequences)
    for position in range(length):
        if len({sequence[position] for sequence in sequences}) > 1:
            return position
    return length
