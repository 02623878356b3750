"""Greedy answers to prompts, under one progress line."""

from __future__ import annotations

from collections.abc import Sequence

from alignez_gguf.engines.base import GenerationRequest, Generator, Sampling
from alignez_gguf.pipeline.job import Job


def greedy_answers(
    job: Job, generator: Generator, prompts: Sequence[str], title: str, max_tokens: int, strength: float = 0.0
) -> list[str]:
    """The likeliest answer of a generator to each prompt, in their order.

    Args:
        title: of the stage that is reported.
        max_tokens: maximum tokens per answer.
        strength: of the generator's edit, if it has one.

    Raises:
        QueryError: a prompt does not fit into the context.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=job.templates.stop)
    requests = [GenerationRequest(prompt, strength=strength) for prompt in prompts]
    texts = [""] * len(requests)
    with job.reporter.stage(title, len(requests)) as advance:
        for index, completion in generator.generate(requests, sampling):
            texts[index] = completion.text
            advance(1)
    return texts
