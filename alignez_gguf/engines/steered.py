"""The steered model as the selection measures it: many edits over the same prompts.

The prompts are computed once, unsteered. Where only the last prompt token and what follows it is steered, an
edit costs one token per query; strengths of one edit are computed together. Needs the patched runtime.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.edits import Edits
from alignez_gguf.errors import ModelFileError, QueryError, WorkDirectoryError
from alignez_gguf.runtime import library
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.scope import GENERATION, Scope
from alignez_gguf.scoring import (
    ANSWER_TOKENS,
    DIVERGENCE_QUERIES,
    NO_LIMITS,
    STEERINGS_TOGETHER,
    Divergence,
    Limits,
    Steering,
    token_divergence,
)

_PIECE = 60
"""Tokens at the ends of prompts that are computed together: on a CPU, 64 tokens or more attend to the cells
of all prompts at once (GGML_FA_TILE_Q in ggml-cpu/common.h)."""
_ANSWERS = (16, 32, 64, 128)
"""Tokens of answers that are computed together, at first, then, and so on: many at once take less time each,
whatever they attend to, but a divergence that is too much ends after a few."""
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ in llama.cpp's src/llama-cparams.h


@dataclass(frozen=True)
class _Query:
    prompt: list[int]
    base_answer: list[int]
    helpful_answer: list[int]


@dataclass(frozen=True)
class _Run:
    """The end of a prompt, from `start` on, and an answer, computed in one sequence."""

    query: int
    sequence: int
    answer: list[int]
    start: int


class SteeredPrompts:
    """Prompts whose keys and values stay in the cache while edits come and go.

    Every query has several sequences over one prompt cache: one for the base model, the others steered.

    Args:
        model: outlives this object.
        prompts: plain prompts, one for each query.
        base_answers: the base model's own answers to them.
        helpful_answers: those of the helpful persona.
        n_threads: default: the number of physical cores.

    Raises:
        QueryError: a prompt has fewer than two tokens, or there are more queries than sequences.
        ModelFileError: the model cannot drop the end of a sequence from its cache.
        WorkDirectoryError: there is no room for a temporary file.
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
        if 2 * count > _MAX_SEQUENCES:
            raise QueryError(
                f"{count} queries are too many to score at once; give {_MAX_SEQUENCES // 2} at most"
            )
        self._copies = min(STEERINGS_TOGETHER, _MAX_SEQUENCES // count - 1)
        bodies = [query.prompt[:-1] for query in self._queries]
        shared = _common_prefix(bodies)
        n_sequences = (1 + self._copies) * count
        longest = max(len(query.prompt) for query in self._queries) + ANSWER_TOKENS
        # llama.cpp wants room for a token of every sequence
        n_batch = max(_PIECE, *_ANSWERS, n_sequences, longest)
        self._together = n_batch if model.uses_gpu else _PIECE
        """Tokens at the ends of prompts that are computed together."""
        with ExitStack() as opened:
            self._context = opened.enter_context(
                Context(
                    model,
                    n_ctx=shared + sum(len(body) - shared for body in bodies) + n_batch,
                    n_sequences=n_sequences,
                    n_batch=n_batch,
                    n_threads=n_threads,
                    unified=True,
                )
            )
            self._read_prompts(bodies, shared)
            # Here and not when it is first asked for: which cells are free, and so how attention rounds,
            # depends on what was measured before.
            measured = self._queries[:DIVERGENCE_QUERIES]
            self._along_base = opened.enter_context(
                self._unsteered([query.base_answer for query in measured])
            )
            self._along_helpful = opened.enter_context(
                self._unsteered([query.helpful_answer for query in measured])
            )
            self._opened = opened.pop_all()

    def first_token_logprobs(
        self, steerings: Sequence[Steering], *, scope: Scope = GENERATION
    ) -> NDArray[np.float32]:
        """Log-probabilities of the first token of the answer, [n_steerings, n_queries, n_vocab].

        The scope `all` computes the prompts anew.
        """
        queries = range(len(self._queries))
        found = np.empty((len(steerings), len(queries), self._context.model.n_vocab), np.float32)
        for first in range(0, len(steerings), self._copies):
            together = steerings[first : first + self._copies]
            runs = []
            controls = self._set_controls([edits for edits, _ in together])
            for copy, (control, (_, strength)) in enumerate(zip(controls, together, strict=True)):
                for query in queries:
                    self._set_strength(query, copy, control, strength, scope)
                    runs.append(self._steered_run(query, copy, [], scope))
            rows = found[first : first + len(together)].reshape(len(runs), -1)
            chunks = self._even_chunks(runs, self._together)
            for row, (logprobs,) in zip(rows, self._logprobs(chunks), strict=True):
                row[:] = logprobs
        return found

    def divergence(
        self, edits: Edits, limits: Limits = NO_LIMITS, *, scope: Scope = GENERATION
    ) -> Divergence:
        """KL(P_base || P_steered), teacher-forced along the answers and to what follows them.

        Ends once it exceeds a limit; see `SteeredModel`.
        """
        (control,) = self._set_controls([edits])
        n_answers = len(self._along_base.answers)
        for query in range(n_answers):
            self._set_strength(query, 0, control, 1.0, scope)
        n_tokens = sum(1 + len(answer) for answer in self._along_base.answers)
        return token_divergence(
            self._divergences(self._along_helpful, scope),
            self._divergences(self._along_base, scope),
            n_answers,
            n_tokens,
            limits,
        )

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> SteeredPrompts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unsteered(self, answers: Sequence[list[int]]) -> _Unsteered:
        """What the base model says along some answers, one to each of the first queries."""
        runs = [
            _Run(number, number, answer, len(query.prompt) - 1)
            for number, (query, answer) in enumerate(zip(self._queries, answers, strict=False))
        ]
        return _Unsteered(answers, self._logprobs(self._growing_chunks(runs)))

    def _divergences(self, unsteered: _Unsteered, scope: Scope) -> Iterator[list[float]]:
        """The divergence at each token of each answer, and at what follows it."""
        runs = [self._steered_run(query, 0, answer, scope) for query, answer in enumerate(unsteered.answers)]
        base = unsteered.logprobs()
        for chunk in self._growing_chunks(runs):
            # All of them now: others may be computed before the next one is asked for.
            yield from [
                [
                    float(np.sum(np.exp(p) * (p - q), dtype=np.float64))
                    for p, q in zip(next(base), rows, strict=True)
                ]
                for rows in self._computed(chunk)
            ]

    def _steered_run(self, query: int, copy: int, answer: list[int], scope: Scope) -> _Run:
        start = 0 if scope.kind == "all" else len(self._queries[query].prompt) - 1
        return _Run(query, self._steered(query, copy), answer, start)

    def _steered(self, query: int, copy: int) -> int:
        return (1 + copy) * len(self._queries) + query

    def _set_controls(self, edits: Sequence[Edits]) -> list[int | None]:
        """Let these edits act, at no strength yet; the number of the control that each is, if it is any.

        Each acts on nothing but the tokens that have a strength of it, so that several cost as much as one.
        """
        pointer = self._context.pointer
        controls: list[Edits] = []
        numbers: list[int | None] = []
        for one in edits:
            if one and not (controls and controls[-1] is one):
                controls.append(one)
            numbers.append(len(controls) - 1 if one else None)
        library.set_controls(pointer, controls, self._context.model.info.n_embd)
        for control in range(len(controls)):
            library.set_strength(pointer, 0.0, control=control)
        return numbers

    def _set_strength(
        self, query: int, copy: int, control: int | None, strength: float, scope: Scope
    ) -> None:
        if control is not None:
            first, end = scope.positions(len(self._queries[query].prompt))
            library.set_strength(
                self._context.pointer,
                strength,
                control=control,
                sequence=self._steered(query, copy),
                first=first,
                end=end,
            )

    def _logprobs(self, chunks: Iterable[Sequence[_Run]]) -> Iterator[NDArray[np.float32]]:
        """Of each run, the log-probabilities after the prompt and after each token of the answer.

        [1 + len(answer), n_vocab]; a chunk is computed together. At each of them the cache is as it was.
        """
        for chunk in chunks:
            yield from self._computed(chunk)

    def _computed(self, chunk: Sequence[_Run]) -> Iterator[NDArray[np.float32]]:
        """The same of runs that are computed together."""
        self._decode(chunk)
        row = 0
        for run in chunk:
            row += len(self._queries[run.query].prompt) - run.start - 1
            rows = range(row, row + 1 + len(run.answer))
            yield np.stack([log_softmax(self._context.logits(index)) for index in rows])
            row = rows.stop

    def _decode(self, runs: Sequence[_Run]) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        outputs: list[bool] = []
        for run in runs:
            prompt = self._queries[run.query].prompt
            computed = prompt[run.start :] + run.answer
            tokens += computed
            positions += range(run.start, run.start + len(computed))
            sequences += [run.sequence] * len(computed)
            outputs += [index >= len(prompt) - 1 - run.start for index in range(len(computed))]
            self._truncate(run)
        self._context.decode(tokens, positions, sequences, outputs)
        for run in runs:
            self._truncate(run)
            if run.start == 0:  # nothing is left of the prompt as `_read_prompts` computed it
                self._context.copy_sequence(run.query, run.sequence)

    def _truncate(self, run: _Run) -> None:
        if not self._context.truncate_sequence(run.sequence, run.start):
            raise ModelFileError(
                "this model cannot drop the end of a prompt from its cache, which the selection needs; "
                "use --recipe paper"
            )

    def _even_chunks(self, runs: Sequence[_Run], most: int) -> Iterator[list[_Run]]:
        """Runs of at most so many tokens together; about as many in each chunk."""
        total = sum(map(self._n_computed, runs))
        return self._chunks(runs, repeat(-(-total // -(-total // most))))

    def _growing_chunks(self, runs: Sequence[_Run]) -> Iterator[list[_Run]]:
        """Runs along answers, more together as it goes on."""
        return self._chunks(runs, chain(_ANSWERS, repeat(_ANSWERS[-1])))

    def _chunks(self, runs: Sequence[_Run], sizes: Iterator[int]) -> Iterator[list[_Run]]:
        """Runs of at most so many tokens together, or one that has more."""
        chunk: list[_Run] = []
        used, size = 0, next(sizes)
        for run in runs:
            count = self._n_computed(run)
            if chunk and used + count > size:
                yield chunk
                chunk, used, size = [], 0, next(sizes)
            chunk.append(run)
            used += count
        yield chunk

    def _n_computed(self, run: _Run) -> int:
        """Tokens of a run that are not in the cache."""
        return len(self._queries[run.query].prompt) - run.start + len(run.answer)

    def _read_prompts(self, bodies: Sequence[list[int]], shared: int) -> None:
        """Compute all prompts but their last tokens; the first `shared` tokens, which all have, only once."""
        self._read(0, bodies[0][:shared], 0)
        for index, body in enumerate(bodies):
            if index > 0:
                self._context.copy_sequence(0, index)
                self._context.truncate_sequence(index, shared)
            self._read(index, body[shared:], shared)
        for index in range(len(bodies)):
            for copy in range(self._copies):
                self._context.copy_sequence(index, self._steered(index, copy))

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


class _Unsteered:
    """Log-probabilities of the base model along answers, with which every edit is compared; in a file.

    Raises:
        WorkDirectoryError: there is no room for the file.
    """

    def __init__(self, answers: Sequence[list[int]], logprobs: Iterator[NDArray[np.float32]]) -> None:
        self.answers = answers
        self._shapes: list[tuple[int, ...]] = []
        try:
            self._file = tempfile.TemporaryFile(prefix="alignez-")  # noqa: SIM115, `__exit__` closes it
            for rows in logprobs:
                self._shapes.append(rows.shape)
                self._file.write(rows.tobytes())
            self._file.flush()
        except OSError as error:
            raise WorkDirectoryError(
                f"cannot keep the base model's probabilities in {tempfile.gettempdir()}: "
                f"{error.strerror or error}; make room there, or set TMPDIR to another folder"
            ) from error

    def logprobs(self) -> Iterator[NDArray[np.float32]]:
        """Of each answer, [1 + len(answer), n_vocab]: after the prompt, and after each token."""
        self._file.seek(0)
        for shape in self._shapes:
            data = self._file.read(math.prod(shape) * np.dtype(np.float32).itemsize)
            yield np.frombuffer(data, np.float32).reshape(shape)

    def __enter__(self) -> _Unsteered:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
