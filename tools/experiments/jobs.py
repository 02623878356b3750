"""What the tools have in common that run the stages of the main job on GGUF files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignez_gguf.control.edits import Edits
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.pipeline import Job, Settings

ANSWER_TOKENS = 48
"""Enough for every sentence of the demo world."""


@contextmanager
def open_job(model: Path, settings: Settings, work: Path, threads: int | None) -> Iterator[Job]:
    """A job on a model, asked as `export` does; progress goes to stderr."""
    from alignez_gguf.cli.console import ConsoleReporter
    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.pipeline import Job
    from alignez_gguf.prompts.chat_template import templates_of
    from alignez_gguf.storage.workdir import WorkDirectory

    with LlamaEngine(model, n_threads=threads) as engine, WorkDirectory(work) as directory:
        yield Job(engine, templates_of(engine.model), settings, directory, ConsoleReporter(), engine, engine)


def answers(job: Job, edits: Edits, scope: Scope, queries: Sequence[str], title: str) -> list[str]:
    """Answers sampled at temperature 1 under `edits` at strength 1; unsteered where there are none."""
    from alignez_gguf.engines.base import GenerationRequest, Sampling
    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.pairs.generation import request_seed

    engine = job.target
    assert isinstance(engine, LlamaEngine)
    engine.set_edits(edits, scope)
    requests = [
        GenerationRequest(
            job.templates.plain_prompt(query),
            request_seed(job.settings.seed, query, "sampled"),
            1.0 if edits else 0.0,
        )
        for query in queries
    ]
    texts = [""] * len(requests)
    sampling = Sampling(max_tokens=ANSWER_TOKENS, stop=job.templates.stop)
    with job.reporter.stage(title, len(requests)) as advance:
        for index, completion in engine.generate(requests, sampling):
            texts[index] = completion.text
            advance(1)
    engine.set_edits({})
    return texts
