"""What fails half-way in its constructor leaves nothing of llama.cpp open."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import llama_cpp.llama_cpp as llama
import pytest

from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import SteeringError
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.runtime.sampling import Sampler
from alignez_gguf.verification.session import VerificationSession
from tests.models import tiny_model


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions of llama.cpp that freed something, in order."""
    gc.collect()
    gc.disable()  # what other tests have left behind is freed before or after
    names: list[str] = []

    def watch(name: str) -> None:
        free = getattr(llama, name)

        def watched(pointer: Any) -> None:
            names.append(name)
            free(pointer)

        monkeypatch.setattr(llama, name, watched)

    for name in ("llama_free", "llama_model_free", "llama_sampler_free"):
        watch(name)
    yield names
    gc.enable()


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_model_is_freed(freed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "llama_model_n_ctx_train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Model(tiny_model("llama").gguf)
    assert freed == ["llama_model_free"]


def test_context_is_freed(freed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(tiny_model("llama").gguf) as model:
        with pytest.raises(SteeringError):
            Context(model, n_ctx=16, edits={7: LayerEdit(remove=[1.0] + [0.0] * 63)})
        assert freed == ["llama_free"]
        monkeypatch.setattr(llama, "llama_state_seq_get_size", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Context(model, n_ctx=16)
    assert freed == ["llama_free", "llama_free", "llama_model_free"]


def test_model_of_a_verification_is_freed(freed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "llama_state_seq_get_size", interrupt)
    with pytest.raises(KeyboardInterrupt):
        VerificationSession(tiny_model("llama").gguf, "a", n_prompt=4, n_answer=1)
    assert freed == ["llama_free", "llama_model_free"]


def test_sampler_is_freed(freed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "llama_sampler_init_temp", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Sampler(seed=0, temperature=1.0, top_p=0.9)
    assert freed == ["llama_sampler_free"]
