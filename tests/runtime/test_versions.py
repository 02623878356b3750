"""A libllama of another version, or with another version of the patch, is refused at every door."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import llama_cpp
import pytest
from llama_cpp import Llama

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import probe, status
from alignez_gguf.runtime import bindings, model
from alignez_gguf.runtime.version import VERSION
from alignez_gguf.steering.steer import Runtime, steer
from tests.models import tiny_model


@pytest.fixture
def another_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if another llama-cpp-python were installed, and nothing of it had been used yet."""
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "__version__", "0.3.9")
        _forget()
        yield
    _forget()


def _forget() -> None:
    bindings._library.cache_clear()
    bindings.ggml_base.cache_clear()
    model._initialise.cache_clear()


@pytest.mark.usefixtures("another_version")
def test_another_llama_cpp_python_is_refused_before_a_model_is_loaded() -> None:
    for use in (bindings.is_patched, bindings.ggml_base, lambda: LlamaEngine(tiny_model("llama").gguf)):
        with pytest.raises(RuntimeUnavailableError, match=r"0\.3\.9.*alignez-gguf runtime build"):
            use()


@pytest.mark.usefixtures("another_version")
@pytest.mark.parametrize("runtime", ["auto", "patched", "stock"])
def test_another_llama_cpp_python_is_not_steered(runtime: Runtime) -> None:
    path = tiny_model("llama").gguf
    control = ControlFile(ModelInfo.from_gguf(path), {1: LayerEdit(remove=[1.0] * 64)})
    llm = Llama(str(path), n_ctx=64, verbose=False)
    with pytest.raises(RuntimeUnavailableError, match=rf"made for {VERSION}"):
        steer(llm, control, runtime=runtime)
    llm.close()


@pytest.mark.parametrize(
    ("found", "version"),
    [
        (SimpleNamespace(), None),
        (SimpleNamespace(llama_set_adapter_edits=None), 0),
        (SimpleNamespace(llama_set_adapter_edits=None, llama_layer_edit_version=lambda: 7), 7),
    ],
)
def test_another_version_of_the_patch_is_refused_with_the_mend(
    found: SimpleNamespace, version: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bindings.patch_version(found) == version
    monkeypatch.setattr(bindings, "_library", lambda: found)
    if version is None:
        assert not bindings.is_patched()
        return
    with pytest.raises(RuntimeUnavailableError, match=f"version {version} .*alignez-gguf runtime build"):
        bindings.is_patched()

    said = status.from_probe(
        probe.ProbeResult({"version": VERSION, "patch_version": version}, True, False, "")
    )
    assert (said.patched, said.steers) == (False, "no")
    assert "alignez-gguf runtime build" in said.mend


def test_the_installed_library_has_the_version_of_this_package() -> None:
    assert bindings.patch_version(bindings._library()) == bindings.PATCH_VERSION
