from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.errors import AlignezError, ModelFileError
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.runtime.quantize import quantize_file
from tests.models import quantized, tiny_model, tokenizer

TEXT = "Question: wie spät ist es?\nAnswer: 🦙 o'clock"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model(tiny_model("llama").gguf) as model:
        yield model


def test_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nowhere\.gguf"):
        Model(tmp_path / "nowhere.gguf")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_file_whose_name_is_not_utf_8_is_opened(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    path.symlink_to(tiny_model("llama").gguf)
    with Model(path) as model:
        assert model.n_vocab > 0


def test_file_that_is_not_a_gguf_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ModelFileError, match=r"model\.gguf is not a usable GGUF"):
        Model(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_file_is_an_error(tmp_path: Path, part: float) -> None:
    whole = tiny_model("llama").gguf.read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ModelFileError, match=r"model\.gguf"):
        Model(path)


def test_file_that_llama_cpp_refuses_is_an_error_with_its_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = tiny_model("llama").gguf.read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_dawn.weight"))
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down\.weight"):
        Model(path)
    assert capfd.readouterr().err == ""


VNNI = frozenset({"AVX2", "AVX512", "AVX512_VNNI", "REPACK"})


@pytest.mark.parametrize(
    ("file_type", "optimize_for_batches", "features", "rearranged"),
    [
        ("Q4_K_M", True, VNNI, False),
        ("Q4_K_M", False, VNNI, True),
        ("Q4_0", True, VNNI, True),
        ("Q4_K_M", True, VNNI | {"AMX_INT8"}, True),
        ("Q4_K_M", True, frozenset({"AVX2", "REPACK"}), True),
        ("Q4_K_M", True, frozenset({"NEON", "DOTPROD", "REPACK"}), True),
    ],
)
def test_k_quants_are_rearranged_unless_many_tokens_are_faster_without(
    file_type: str,
    optimize_for_batches: bool,
    features: frozenset[str],
    rearranged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    load = llama.llama_model_load_from_file

    def watched(path: bytes, parameters: Any) -> Any:
        asked.append(parameters.use_extra_bufts)
        return load(path, parameters)

    monkeypatch.setattr(llama, "llama_model_load_from_file", watched)
    monkeypatch.setattr(bindings, "cpu_features", lambda: features)
    path = quantized(tiny_model("llama", n_embd=256).gguf, file_type)
    Model(path, n_gpu_layers=0, optimize_for_batches=optimize_for_batches).close()
    assert asked == [rearranged]


@pytest.mark.parametrize("n_tokens", [1, 5, 40, 200])
def test_weights_as_they_are_compute_what_stock_llama_cpp_does(
    n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "cpu_features", lambda: VNNI)
    path = quantized(tiny_model("llama", n_embd=256).gguf, "Q4_K_M")
    tokens = np.random.default_rng(0).integers(5, 300, n_tokens)
    found = []
    for optimize_for_batches in (False, True):
        with (
            Model(path, n_gpu_layers=0, optimize_for_batches=optimize_for_batches) as model,
            Context(model, n_ctx=256, n_batch=256, n_threads=1) as context,
        ):
            context.decode(tokens, np.arange(n_tokens), np.zeros(n_tokens), np.ones(n_tokens))
            found.append(np.stack([context.logits(index) for index in range(n_tokens)]))
    np.testing.assert_allclose(found[1], found[0], atol=0.03 * np.abs(found[0]).max())


def test_cpu_features_are_those_that_llama_cpp_names() -> None:
    named = llama.llama_print_system_info().decode()
    found = bindings.cpu_features()
    assert all(f"{feature} = 1" in named for feature in found)
    assert len(found) == named.count(" = 1")


def test_tokens_are_those_of_the_tokenizer(model: Model) -> None:
    assert model.tokenize(TEXT) == tokenizer().encode(TEXT)
    assert model.detokenize(model.tokenize(TEXT)) == TEXT


def test_special_tokens_in_a_text_are_read_and_have_no_text(model: Model) -> None:
    tokens = model.tokenize("<s>x</s>")
    assert (tokens[0], tokens[-1]) == (0, 1)
    assert model.detokenize(tokens) == "x"
    assert model.ends_text(1)
    assert not model.ends_text(tokens[1])


def test_text_that_brings_the_start_token_gets_no_second_one_and_no_warning(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Model(demo.MODEL) as model:
        assert model.adds_bos
        start = model.token_text(model.bos)
        plain, brought, spaced = (model.tokenize(f"{bos}How can I") for bos in ("", start, f"{start} "))
        assert (plain[0], brought[0]) == (model.bos, model.bos)
        assert model.bos not in (*plain[1:], *brought[1:], *spaced[1:])
        assert model.detokenize(brought) == model.detokenize(plain)
        assert model.tokenize(start + start)[:2] == [model.bos, model.bos]
    assert capfd.readouterr().err == ""


def test_metadata_of_the_file_can_be_looked_up(model: Model) -> None:
    assert model.metadata("general.architecture") == "llama"
    assert model.metadata("alignez.templates") is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantized_weights_are_not_in_memory_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped(path: Path) -> bool:
        with Model(path, n_gpu_layers=0):
            return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")

    quantized = tmp_path / "model.gguf"
    quantize_file(tiny_model("llama").gguf, quantized, "Q8_0")
    assert mapped(tiny_model("llama").gguf)
    assert not mapped(quantized)
    monkeypatch.setattr("alignez_gguf.runtime.model._MOST_READ", 0)
    assert mapped(quantized)


def test_model_and_context_refuse_to_be_used_once_closed() -> None:
    model = Model(tiny_model("llama").gguf)
    context = Context(model, n_ctx=64, n_threads=1)
    context.close()
    context.close()
    with pytest.raises(ValueError, match="context is closed"):
        context.decode([5], [0], [0], [True])
    with pytest.raises(ValueError, match="context is closed"):
        context.clear()
    model.close()
    with pytest.raises(ValueError, match="model is closed"):
        model.tokenize("x")


def test_batch_that_cannot_be_computed_is_an_error(model: Model) -> None:
    with (
        Context(model, n_ctx=256, n_threads=1) as context,
        pytest.raises(AlignezError, match="batch is invalid"),
    ):
        context.decode([model.n_vocab + 7], [0], [0], [True])


def test_full_cache_is_an_error(model: Model) -> None:
    with Context(model, n_ctx=256, n_threads=1) as context:
        context.decode([5] * 200, range(200), [0] * 200, [False] * 200)
        with pytest.raises(AlignezError, match="cache is full"):
            context.decode([5] * 100, range(200, 300), [0] * 100, [False] * 100)


def test_batch_larger_than_the_context_takes_is_refused(model: Model) -> None:
    with (
        Context(model, n_ctx=256, n_batch=32, n_threads=1) as context,
        pytest.raises(ValueError, match="1 to 32"),
    ):
        context.decode([5] * 33, range(33), [0] * 33, [False] * 33)


def test_logits_are_a_view_of_the_last_batch(model: Model) -> None:
    with Context(model, n_ctx=256, n_threads=1) as context:
        context.decode([5, 6], [0, 1], [0, 0], [False, True])
        logits = context.logits(1)
        assert logits.shape == (model.n_vocab,)
        assert logits.base is not None
        assert np.isfinite(logits).all()
        with pytest.raises(ValueError, match=r"token 0 .* no logits"):
            context.logits(0)
