"""Models that are steered, by the fixture `model` of a module. Tiny ones are quickest on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from llama_cpp import Llama

from tests.models import TinyModel
from tests.runtime.conftest import _one_thread
from tests.steering.asking import load

__all__ = ["_one_thread"]


@pytest.fixture
def llm(model: TinyModel) -> Iterator[Llama]:
    llm = load(model.gguf)
    yield llm
    llm.close()


@pytest.fixture
def never_steered(model: TinyModel) -> Iterator[Llama]:
    llm = load(model.gguf)
    yield llm
    llm.close()
