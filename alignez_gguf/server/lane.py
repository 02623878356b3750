"""The sequences of a server: prompts arrive piece by piece between the steps of the answers that grow.

All of them share a context and its batches, whichever control steers them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.edits import Edits
from alignez_gguf.engines.slots import (
    EXACT_PIECE,
    FAST_PIECE,
    UNSTEERED,
    Piece,
    Slots,
    Treatment,
    can_be_exact,
    company_needed_from,
)
from alignez_gguf.errors import SteeringError
from alignez_gguf.gate import Gate
from alignez_gguf.runtime import library
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.server.answer import Answer
from alignez_gguf.server.jobs import Ticket

_PIECES_PER_TURN = 4
_TOKENS_PER_TURN = _PIECES_PER_TURN * EXACT_PIECE
"""So many pieces of prompts are computed between two steps, and no further one after so many tokens: new ones
get in, running ones never wait long."""

_STAGING = 2
"""Sequences in which prompts arrive, before they join those that grow: one, and its unsteered twin."""

_ARRIVED = object()

Take = Callable[[int], Ticket | None]
"""Gives the next ticket that needs at most so many sequences, if there is one."""


@dataclass(frozen=True, eq=False)
class _Row:
    """A sequence that grows: an answer, or the unsteered model over the same tokens (`is_twin`)."""

    answer: Answer
    is_twin: bool = False


class Lane:
    """Writes answers, many in a batch, each with a control, a strength and a scope of its own.

    What an answer says depends on its job alone: to the bit on a CPU with F32, F16 or Q8_0 weights (see
    `engines.slots`), but for rounding elsewhere.

    Args:
        model: outlives the lane.
        controls: the edits of each control, by name; without any, all answers are unsteered.
        gates: of the controls that have one, by name.
        n_ctx: the longest prompt and answer together, in tokens.
        n_parallel: the most sequences that grow at once.
        n_threads: default: the number of physical cores.

    Raises:
        SteeringError: the edits cannot be applied to this model.
        ModelFileError: there is not enough memory for the sequences.
    """

    def __init__(
        self,
        model: Model,
        controls: Mapping[str, Edits],
        gates: Mapping[str, Gate],
        *,
        n_ctx: int,
        n_parallel: int,
        n_threads: int | None = None,
    ) -> None:
        self.n_parallel = max(n_parallel, 2)
        exact = can_be_exact(model)
        piece = EXACT_PIECE if exact else FAST_PIECE
        self._numbers = {name: number for number, name in enumerate(controls)}
        self._gates = gates
        with ExitStack() as opened:
            self._context = opened.enter_context(
                Context(
                    model,
                    n_ctx=n_ctx,
                    n_sequences=self.n_parallel + _STAGING,
                    n_batch=max(piece, self.n_parallel + _STAGING),
                    n_threads=n_threads,
                )
            )
            for gate in gates.values():
                gate.check_fits(model.n_vocab)
            if controls:
                library.set_controls(self._context.pointer, list(controls.values()))
            for number in self._numbers.values():
                library.set_strength(self._context.pointer, 0.0, control=number)
            opened.pop_all()
        lone = company_needed_from(model.info.quantization)
        self._slots = Slots(
            self._context, piece=piece, company_from=lone if exact else None, steer=self._steer
        )
        self._growing: list[_Row] = []
        self._n_arrived = 0
        """Tokens of prompts that were computed in this turn."""
        self._arriving: Answer | None = None
        self._arrival: Iterator[None] = iter(())

    @property
    def n_growing(self) -> int:
        """How many answers are being written."""
        return sum(not row.is_twin for row in self._growing) + (self._arriving is not None)

    def turn(self, take: Take) -> None:
        """Compute some of the prompts that arrive, and then one token of every answer."""
        self._drop_done()
        self._n_arrived = 0
        for _ in range(_PIECES_PER_TURN):
            if self._n_arrived >= _TOKENS_PER_TURN:
                break
            if self._arriving is None:
                ticket = take(self.n_parallel - len(self._growing))
                if ticket is None:
                    break
                self._arriving = Answer(ticket)
                self._arrival = self._arrive(self._arriving)
            if self._arriving.ticket.cancelled:
                self._end_arrival()
            elif next(self._arrival, _ARRIVED) is _ARRIVED:
                self._arriving = None
        if self._growing:
            self._step()

    def fail(self, message: str) -> None:
        """End every answer and forget all that was computed."""
        if self._arriving is not None:
            self._arriving.fail(message)
            self._end_arrival()
        for row in self._growing:
            if not row.is_twin and not row.answer.finished:
                row.answer.fail(message)
        self._growing, left = [], self._growing
        for row in left:
            row.answer.close()
        self._slots.clear()

    def close(self) -> None:
        """Free the context; no answer may be growing."""
        self._context.close()

    def _arrive(self, answer: Answer) -> Iterator[None]:
        """Compute a prompt, yielding between its pieces; then draw the first token, and grow."""
        job = answer.job
        treatment = UNSTEERED
        if job.strength:
            scope = job.scope.positions(len(job.tokens))
            treatment = Treatment(job.strength, *scope, control=self._numbers[job.control])
        gate = self._gates.get(job.control) if job.strength else None
        base_logits: NDArray[np.float32] | None = None
        own, twin = range(self.n_parallel, self.n_parallel + _STAGING)
        if job.divergence or gate is not None:
            index = yield from self._prompt(twin if job.divergence else own, job.tokens, UNSTEERED)
            base_logits = self._context.logits(index).copy()
        if gate is not None and base_logits is not None:
            try:
                answer.steered = gate.opens(base_logits)
            except SteeringError as error:
                answer.fail(str(error))
                answer.close()
                return
        is_closed = answer.steered is False
        if job.divergence or not is_closed:
            index = yield from self._prompt(own, job.tokens, UNSTEERED if is_closed else treatment)
        answer.advance(self._context, index, base_logits if job.divergence else None)
        if answer.done:
            answer.close()
            return
        for staged, is_twin in ((own, False), (twin, True))[: job.n_sequences]:
            self._slots.move(staged, len(self._growing))
            self._growing.append(_Row(answer, is_twin))

    def _prompt(self, slot: int, tokens: tuple[int, ...], treatment: Treatment) -> Generator[None, None, int]:
        """Make a slot hold a prompt, yielding between its pieces; the index of its logits."""
        *first, last = self._slots.plan(slot, tokens, len(tokens) - 1, treatment)
        for piece in first:
            self._compute(slot, piece)
            yield
        self._compute(slot, last)
        return len(last.tokens) - 1

    def _compute(self, slot: int, piece: Piece) -> None:
        self._slots.compute(slot, piece)
        self._n_arrived += len(piece.tokens)

    def _end_arrival(self) -> None:
        if self._arriving is not None:
            self._arriving.close()
        self._arriving, self._arrival = None, iter(())

    def _step(self) -> None:
        """One token of every answer that grows."""
        self._slots.step([row.answer.last for row in self._growing])
        twins = {row.answer: slot for slot, row in enumerate(self._growing) if row.is_twin}
        for slot, row in enumerate(self._growing):
            if row.is_twin:
                continue
            twin = twins.get(row.answer)
            base_logits = None if twin is None else self._context.logits(twin)
            row.answer.advance(self._context, slot, base_logits)
        self._drop_done()

    def _drop_done(self) -> None:
        """Close the gaps of answers that ended, so that the others keep the first slots."""
        for slot in reversed(range(len(self._growing))):
            row, last = self._growing[slot], self._growing[-1]
            if not row.answer.done:
                continue
            if not row.is_twin:
                row.answer.close()
            if row is not last:
                self._slots.move(len(self._growing) - 1, slot)
                self._growing[slot] = last
            self._growing.pop()

    def _steer(self, context: Context, slot: int, treatment: Treatment) -> None:
        """Give a sequence its strength of one control, and none of the others: it may have had one before."""
        for number in self._numbers.values():
            library.set_strength(
                context.pointer,
                treatment.strength if number == treatment.control else 0.0,
                control=number,
                sequence=slot,
                first=treatment.first,
                end=treatment.end,
            )
