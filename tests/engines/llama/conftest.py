"""Models with a KV cache alone and with a recurrent state too, and an engine of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from alignez_gguf.engines.llama.engine import LlamaEngine
from tests.models import TinyModel, tiny_model


@pytest.fixture(scope="module", params=["llama", "lfm2"], ids=["keys and values", "a state too"])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


@pytest.fixture
def engine(tiny: TinyModel) -> Iterator[LlamaEngine]:
    with LlamaEngine(tiny.gguf, n_ctx=256, n_parallel=4, n_threads=1) as engine:
        yield engine
