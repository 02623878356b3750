"""Models that do not write text token by token are refused before they are loaded, by every door."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from alignez_gguf import demo, steer
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.control.model_kind import require_text_model
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import ModelFileError
from alignez_gguf.installer.source import source_tree
from alignez_gguf.predict.embedder import GgufEmbedder
from alignez_gguf.runtime.model import Model
from alignez_gguf.server.service import Service
from alignez_gguf.steering.patched import steering_support
from tests.silent_models import write_bert, write_embedding_decoder, write_t5

KINDS = {
    "t5": (write_t5, "an encoder-decoder model"),
    "bert": (write_bert, "an embedding model"),
    "embedding decoder": (write_embedding_decoder, "an embedding or reranking model"),
}


@pytest.fixture(scope="module", params=KINDS)
def silent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file and what it is."""
    write, kind = KINDS[request.param]
    return write(tmp_path_factory.mktemp("silent") / "silent.gguf"), kind


WIDTH = ModelInfo.from_gguf(demo.MODEL).n_embd
DOORS: dict[str, Callable[[Path], Any]] = {
    "ModelInfo": ModelInfo.from_gguf,
    "Model": Model,
    "LlamaEngine": LlamaEngine,
    "steering_support": steering_support,
    "Service": lambda path: Service(path, {}),
}


@pytest.mark.parametrize("door", DOORS)
def test_model_that_writes_no_text_is_refused_before_it_is_loaded(
    door: str, silent: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp.llama_cpp as llama

    path, kind = silent
    monkeypatch.delattr(llama, "llama_model_load_from_file")
    with pytest.raises(ModelFileError, match=rf"silent\.gguf is {kind}.*; give a language model") as refusal:
        DOORS[door](path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"lfm2.attention.causal": False},
        {"lfm2.attention.causal": "false"},
        {"lfm2.pooling_type": 1},
        {"lfm2.pooling_type": "4"},
    ],
)
def test_metadata_of_an_embedding_model_is_refused_whatever_the_architecture(metadata: Any) -> None:
    with pytest.raises(ModelFileError, match=r"it is an embedding .*, which writes no text"):
        require_text_model("lfm2", metadata, "it")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"lfm2.attention.causal": True, "lfm2.pooling_type": 0},
        {"lfm2.attention.causal": "true", "lfm2.pooling_type": "0"},
        {"lfm2.pooling_type": 2**32 - 1},
        {"bert.attention.causal": False, "bert.pooling_type": 1},
    ],
)
def test_metadata_of_a_decoder_passes(metadata: Any) -> None:
    require_text_model("lfm2", metadata, "it")


def test_loaded_model_is_refused_by_the_metadata_that_llama_cpp_hands_out(tmp_path: Path) -> None:
    class Loaded:
        model_path = str(tmp_path / "gone.gguf")
        metadata = {  # noqa: RUF012
            "general.architecture": "qwen3",
            "qwen3.block_count": "2",
            "qwen3.embedding_length": "64",
            "qwen3.pooling_type": "3",
        }

    with pytest.raises(ModelFileError, match="the loaded model is an embedding or reranking model"):
        ModelInfo.from_llama(Loaded())


def test_control_on_a_loaded_embedding_model_is_refused(tmp_path: Path) -> None:
    path = write_embedding_decoder(tmp_path / "embedder.gguf")
    control = ControlFile(ModelInfo.from_gguf(demo.MODEL), {1: LayerEdit(remove=np.eye(1, WIDTH))})
    llm = Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    with pytest.raises(ModelFileError, match="an embedding or reranking model"):
        steer(llm, control)
    llm.close()


def test_every_architecture_that_llama_cpp_does_not_decode_causally_is_known() -> None:
    source = source_tree() / "vendor" / "llama.cpp" / "src"
    arches, model = (
        (source / name).read_text(encoding="utf-8") for name in ("llama-arch.cpp", "llama-model.cpp")
    )
    name_of = dict(re.findall(r"\{ (LLM_ARCH_\w+), +\"([^\"]+)\"", arches))

    def cases(text: str, start: str, end: str) -> set[str]:
        part = text[text.index(start) :]
        return {name_of[case] for case in re.findall(r"case (LLM_ARCH_\w+):", part[: part.index(end)])}

    encoders = cases(model, "bool llama_model_has_encoder(", "return true")
    without_cache = cases(model, "llama_model::create_memory(", "res = nullptr")
    diffusion = cases(arches, "bool llm_arch_is_diffusion(", "return true")
    never_causal = {
        path.stem
        for path in (source / "models").glob("*.cpp")
        if "hparams.causal_attn = false" in path.read_text(encoding="utf-8")
    }
    assert {"t5", "bert", "dream", "gemma-embedding"} <= encoders | without_cache | never_causal
    for arch in sorted(encoders | without_cache | diffusion | never_causal):
        with pytest.raises(ModelFileError):
            require_text_model(arch, {}, "it")


def test_embedding_model_still_embeds_and_an_encoder_decoder_does_not(tmp_path: Path) -> None:
    vector = GgufEmbedder(write_bert(tmp_path / "bert.gguf"), n_threads=1).embed("How do I bake a cake?")
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)
    with pytest.raises(ModelFileError, match=r"an encoder-decoder model \(t5\).*; give an embedding model"):
        GgufEmbedder(write_t5(tmp_path / "t5.gguf"), n_threads=1)
