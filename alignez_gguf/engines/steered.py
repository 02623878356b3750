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
from alignez_gguf.selection import ANSWER_TOKENS, Divergence

DIVERGENCE_QUERIES = 24
"""Queries over which the divergence is measured."""
_BATCH = 512


@dataclass(frozen=True)
class _Query:
    prompt: list[int]
    base_answer: list[int]
    helpful_answer: list[int]


@dataclass(frozen=True)
class _Run:
    """The end of a prompt and an answer, computed in one sequence."""

    query: int
    sequence: int
    answer: list[int]


class SteeredPrompts:
    """Prompts whose keys and values stay in the cache while edits come and go.

    Every query has two sequences over one prompt cache: one for the base model, one that is steered.

    Args:
        model: outlives this object.
        prompts: plain prompts, one for each query.
        base_answers: the base model's own answers to them.
        helpful_answers: those of the helpful persona.
        n_threads: default: the number of physical cores.

    Raises:
        QueryError: a prompt has fewer than two tokens.
        ModelFileError: the model cannot drop the end of a sequence from its cache.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        base_answers: Sequence[str],
        helpful_answers: Sequence[str],
        *,
        n_threads: int | None = None,
    ) -> None:
        texts = zip(prompts, base_answers, helpful_answers, strict=True)
        self._queries = [_query(model, *query) for query in texts]
        count = len(self._queries)
        # llama.cpp wants room for a token of every sequence
        n_batch = max(_BATCH, 2 * count)
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
        self._decode([_Run(query, self._steered(query), []) for query in queries])
        return np.stack([log_softmax(self._context.logits(query)) for query in queries])

    def divergence(self, edits: Edits) -> Divergence:
        """KL(P_base || P_steered), teacher-forced along the answers and to what follows them."""
        self._set(edits)
        measured = self._queries[:DIVERGENCE_QUERIES]
        along_base = self._divergences([query.base_answer for query in measured])
        along_helpful = self._divergences([query.helpful_answer for query in measured])
        return Divergence(
            per_token=float(np.mean(np.concatenate(along_base))),
            after_first=float(np.mean([sum(answer[1:]) for answer in along_helpful])),
        )

    def _divergences(self, answers: Sequence[list[int]]) -> list[list[float]]:
        """The divergence at each token of each answer, and at what follows it."""
        found: list[list[float]] = []
        for chunk in self._chunks(answers):
            self._decode(
                [
                    _Run(query, sequence, answers[query])
                    for query in chunk
                    for sequence in (query, self._steered(query))
                ]
            )
            row = 0
            for query in chunk:
                length = len(answers[query]) + 1
                found.append([self._row_divergence(base, base + length) for base in range(row, row + length)])
                row += 2 * length
        return found

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

    def _decode(self, runs: Sequence[_Run]) -> None:
        """Compute the last prompt token of each run and its answer.

        The cache is as it was afterwards; the logits of all tokens are at hand, in order.
        """
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for run in runs:
            prompt = self._queries[run.query].prompt
            computed = [prompt[-1], *run.answer]
            tokens += computed
            positions += range(len(prompt) - 1, len(prompt) - 1 + len(computed))
            sequences += [run.sequence] * len(computed)
        self._context.decode(tokens, positions, sequences, np.ones(len(tokens), np.int8))
        for run in runs:
            if not self._context.truncate_sequence(run.sequence, len(self._queries[run.query].prompt) - 1):
                raise ModelFileError(
                    "this model cannot drop the end of a prompt from its cache, which the selection needs; "
                    "use --recipe paper"
                )

    def _chunks(self, answers: Sequence[list[int]]) -> Iterator[list[int]]:
        """Queries whose answers fit into one batch together, base and steered."""
        chunk: list[int] = []
        used = 0
        for query, answer in enumerate(answers):
            needed = 2 * (len(answer) + 1)
            if used + needed > self._context.n_batch:
                yield chunk
                chunk, used = [], 0
            chunk.append(query)
            used += needed
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


def _query(model: Model, prompt: str, base_answer: str, helpful_answer: str) -> _Query:
    prompt_tokens = model.tokenize(prompt)
    if len(prompt_tokens) < 2:
        raise QueryError(f"the prompt {prompt!r} is too short to steer its answer; give a longer query")

    def answer_tokens(answer: str) -> list[int]:
        return model.tokenize(prompt + answer)[len(prompt_tokens) :][:ANSWER_TOKENS]

    return _Query(prompt_tokens, answer_tokens(base_answer), answer_tokens(helpful_answer))


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = min(len(sequence) for sequence in sequences)
    for position in range(length):
        if len({sequence[position] for sequence in sequences}) > 1:
            return position
    return length
