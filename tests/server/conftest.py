"""A server over the demo model, within this process, and who asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import openai
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.engines.base import GenerationRequest, Sampling
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.server.limits import Connection
from alignez_gguf.server.service import RequestLimits, Service
from tests.server.client import Server, serving

NAMES = ("safe", "other")


def _control(seed: int) -> ControlFile:
    """Random directions for the demo model, strong enough to change its answers."""
    info = ModelInfo.from_gguf(demo.MODEL)
    normal = np.random.default_rng(seed).standard_normal
    return ControlFile(
        info, {1: LayerEdit(remove=normal(info.n_embd)), 2: LayerEdit(add=10 * normal(info.n_embd))}
    )


@pytest.fixture(scope="package")
def controls() -> dict[str, ControlFile]:
    return {name: _control(seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="package")
def control_path(controls: dict[str, ControlFile], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("server") / "safe.gguf"
    controls["safe"].save(path)
    return path


Serve = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="package")
def serve(controls: dict[str, ControlFile]) -> Serve:
    """Start a server with some limits; it ends with the block."""

    def serve(
        *,
        api_keys: tuple[str, ...] = (),
        n_ctx: int = 256,
        n_parallel: int = 16,
        connection: type[Connection] = Connection,
        **limits: int,
    ) -> AbstractContextManager[Server]:
        service = Service(
            demo.MODEL,
            controls,
            n_ctx=n_ctx,
            n_parallel=n_parallel,
            n_threads=1,
            limits=RequestLimits(**limits),
        )
        return serving(service, api_keys, connection)

    return serve


@pytest.fixture(scope="package")
def server(serve: Serve) -> Iterator[Server]:
    """One that most tests share."""
    with serve() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


Lone = Callable[..., str]


@pytest.fixture(scope="package")
def lone(controls: dict[str, ControlFile]) -> Iterator[Lone]:
    """What a request gets that nobody else disturbs: from the engine that `alignez-gguf generate` uses."""
    engines = {}
    for name, control in controls.items():
        for scope in ("generation", "all"):
            engines[name, scope] = LlamaEngine(demo.MODEL, n_ctx=256, n_parallel=1, n_threads=1)
            engines[name, scope].set_edits(control.edits, scope)

    def lone(
        prompt: str,
        seed: int = 0,
        strength: float = 0.0,
        *,
        control: str = "safe",
        scope: str = "generation",
        max_tokens: int = 12,
        temperature: float = 1.0,
        stop: tuple[str, ...] = (),
    ) -> str:
        ((_, completion),) = engines[control, scope].generate(
            [GenerationRequest(prompt, seed, strength)], Sampling(max_tokens, temperature, stop=stop)
        )
        return completion.text

    yield lone
    for engine in engines.values():
        engine.close()
