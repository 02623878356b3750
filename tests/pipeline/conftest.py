"""The main job over the demo model, with few enough candidates to be quick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignez_gguf import demo
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Export, Job, Settings, export
from alignez_gguf.pipeline.job import EditScoringEngine
from alignez_gguf.progress import SilentReporter
from alignez_gguf.prompts.templates import METADATA_KEY, Templates
from alignez_gguf.storage.workdir import WorkDirectory

N_QUERIES = 48
QUERIES = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:N_QUERIES]
SETTINGS = Settings(max_tokens=24)
QUICK = replace(
    SETTINGS,
    method="mean",
    reading="prompt",
    hook="mlp",
    kl_budget=1.0,
)
"""A search among a few candidates, without the training of probes."""

Run = Callable[..., Export]


@pytest.fixture(scope="session")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(demo.MODEL, n_threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def templates(engine: LlamaEngine) -> Templates:
    return Templates.from_toml(engine.model.metadata(METADATA_KEY) or "")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of all tests that don't need a fresh one."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def run(engine: LlamaEngine, templates: Templates, folder: Path) -> Run:
    """Export from the first queries of the demo."""

    def run(
        settings: Settings = QUICK,
        place: Path = folder,
        queries: Sequence[str] = QUERIES,
        target: EditScoringEngine = engine,
        framing: Templates = templates,
        **more: Any,
    ) -> Export:
        with WorkDirectory(place) as work:
            reporter = SilentReporter()
            return export(target, queries, framing, settings, work, reporter, target=target, **more)

    return run


@pytest.fixture(scope="session")
def quick(run: Run) -> Export:
    return run()


@pytest.fixture
def job(engine: LlamaEngine, templates: Templates, tmp_path: Path) -> Iterator[Job]:
    """A job in a fresh work directory."""
    with WorkDirectory(tmp_path / "work") as work:
        yield Job(engine, templates, QUICK, work, SilentReporter(), engine, engine)


def with_engine(job: Job, engine: Any) -> Job:
    """The same job with everything done by another engine."""
    return replace(job, engine=engine, target=engine, generator=engine)


class Watched:
    """An engine that counts the texts that go through each of its methods."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.counts: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if name not in (
            "generate",
            "activations",
            "response_logprobs",
            "next_token_logprobs",
            "steered",
        ):
            return found

        def counted(texts: Sequence[Any], *arguments: Any, **options: Any) -> Any:
            if texts:
                self.counts[name] = self.counts.get(name, 0) + len(texts)
            return found(texts, *arguments, **options)

        return counted


def texts(pairs: Sequence[PreferencePair]) -> list[tuple[str, int]]:
    return [(pair.query, pair.sample) for pair in pairs]
