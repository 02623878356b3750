"""Continuous batching: many texts grow together, and a prompt joins as soon as another text is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from alignez_gguf.engines import Completion, Sampling
from alignez_gguf.engines.completing import GrowingCompletion
from alignez_gguf.engines.slots import Slots, Treatment
from alignez_gguf.gate import Gate
from alignez_gguf.runtime.model import Model
from alignez_gguf.runtime.sampling import Sampler, SamplerThreads


@dataclass(frozen=True)
class Job:
    """A request, ready to be computed."""

    index: int
    tokens: Sequence[int]
    seed: int
    treatment: Treatment
    keep_prompt: bool
    gate: Gate | None = None


def generate(
    slots: Slots,
    n_parallel: int,
    jobs: Sequence[Job],
    sampling: Sampling,
    on_text: Callable[[int, str], None] | None,
) -> Iterator[tuple[int, Completion]]:
    """Complete all jobs, at most `n_parallel` at a time; each is yielded when it is finished.

    The growing texts always occupy the first slots, since llama.cpp computes only sequences with
    neighbouring numbers together (`llama_batch_allocr::split_equal` in src/llama-batch.cpp).
    """
    waiting = iter(jobs)
    growing: list[_Growing] = []

    def start(slot: int) -> Iterator[tuple[int, Completion]]:
        """Fill a slot with the next job that is not finished by its first token."""
        for job in waiting:
            text = opened.enter_context(_Growing(job, sampling, on_text))
            logits = slots.prefill(slot, job.tokens, job.treatment, job.gate)
            if job.keep_prompt:
                slots.keep(slot)
            text.steered = slots.is_steered(slot)
            text.take(slots.context.model, text.sampler.sample(slots.context, logits))
            if text.completion is None:
                growing[slot : slot + 1] = [text]
                return
            yield job.index, text.completion

    with ExitStack() as opened:
        threads = opened.enter_context(SamplerThreads(slots.context))
        while len(growing) < n_parallel:
            occupied = len(growing)
            yield from start(occupied)
            if len(growing) == occupied:
                break
        while growing:
            slots.step([text.last for text in growing])
            drawn = threads.sample([text.sampler for text in growing])
            for text, token in zip(growing, drawn, strict=True):
                text.take(slots.context.model, token)
            for slot in reversed(range(len(growing))):
                text = growing[slot]
                if text.completion is None:
                    continue
                text.close()
                yield text.index, text.completion
                yield from start(slot)
                if growing[slot] is text:
                    if slot < len(growing) - 1:
                        slots.move(len(growing) - 1, slot)
                        growing[slot] = growing[-1]
                    growing.pop()


class _Growing(GrowingCompletion):
    """The completion of a job, with the sampler that draws it. `close` frees that."""

    def __init__(self, job: Job, sampling: Sampling, on_text: Callable[[int, str], None] | None) -> None:
        super().__init__(job.index, sampling, on_text)
        self.sampler = Sampler(seed=job.seed, temperature=sampling.temperature, top_p=sampling.top_p)

    def take(self, model: Model, token: int) -> None:
        """Go on with a token that was drawn."""
        if model.ends_text(token):
            self.end()
        else:
            self.add(token, model.piece(token))

    def close(self) -> None:
        self.sampler.close()

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
