from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alignez_gguf.engines.llama import LlamaEngine
from alignez_gguf.engines.slots import Slots
from alignez_gguf.errors import ModelFileError, QueryError
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from alignez_gguf.runtime.reader import MlpOutputReader
from tests.models import ARCHITECTURES, TinyModel, quantized, tiny_model, tokenizer

SHARED = "Question: how do I bake a cake?\nAnswer: make a plan, work slowly and mind the oven.\n" * 3
TEXTS = [f"{SHARED}Question: why?", f"{SHARED}Question: how?\nAnswer: sorry", "x", "The quick brown fox"]

FLOAT16 = 2.0**-11
"""Half the distance of neighbouring numbers in float16, relative."""


def hooked(tiny: TinyModel, text: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """PyTorch's MLP outputs [n_layer, n_embd] at the last token, and the log-probabilities after it."""
    outputs: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for module in tiny.mlp_modules
    ]
    logits = tiny.hf(torch.tensor([tokenizer().encode(text)])).logits[0, -1]
    for handle in handles:
        handle.remove()
    rows = [
        (output[0] if isinstance(output, tuple) else output).reshape(-1, tiny.hf.config.hidden_size)[-1]
        for output in outputs
    ]
    return torch.stack(rows).numpy(), torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlp_outputs_are_what_hooks_on_the_mlp_modules_see(architecture: str) -> None:
    tiny = tiny_model(architecture)
    with Model(tiny.gguf) as model:
        reader = MlpOutputReader(model.info.arch, model.info.n_layer, model.info.n_embd)
        context = Context(model, n_ctx=256, n_batch=63, n_threads=1, f32_cache=True, on_node=reader.on_node)
        with context:
            slots = Slots(context)
            slots.prefill(0, model.tokenize(TEXTS[-1]), before_last=reader.arm)
            reader.learn()
            for text in TEXTS:
                slots.prefill(0, model.tokenize(text), before_last=reader.arm)
                expected, _ = hooked(tiny, text)
                # llama.cpp looks up gemma's GELU in a table of float16.
                base = 2e-3 if architecture == "gemma3" else 2e-5
                np.testing.assert_allclose(
                    reader.take().astype(np.float32),
                    expected,
                    rtol=FLOAT16,
                    atol=base * np.abs(expected).max(),
                )


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(tiny_model("llama").gguf, n_ctx=256, n_threads=1) as engine:
        yield engine


def test_engine_reads_texts_in_order_one_at_a_time(engine: LlamaEngine) -> None:
    tiny = tiny_model("llama")
    outputs = engine.mlp_outputs(TEXTS)
    for text in TEXTS:
        found = next(outputs)
        expected, _ = hooked(tiny, text)
        assert found.dtype == np.float16
        assert found.shape == (3, 64)
        # The engine's KV cache is in float16.
        np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
    assert next(outputs, None) is None


def test_reading_does_not_depend_on_what_was_read_before(engine: LlamaEngine) -> None:
    together = list(engine.mlp_outputs(TEXTS))
    for text, expected in zip(reversed(TEXTS), reversed(together), strict=True):
        (found,) = engine.mlp_outputs([text])
        np.testing.assert_array_equal(found, expected)


def test_next_token_logprobs_are_those_of_the_model(engine: LlamaEngine) -> None:
    tiny = tiny_model("llama")
    for text, found in zip(TEXTS, engine.next_token_logprobs(TEXTS), strict=True):
        _, expected = hooked(tiny, text)
        np.testing.assert_allclose(found, expected, atol=2e-2)
        assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)


def test_text_that_does_not_fit_is_refused_before_anything_is_read(engine: LlamaEngine) -> None:
    with pytest.raises(QueryError, match=r"takes \d+ tokens, more than the context of 256"):
        engine.mlp_outputs(["x", "why " * 200])


def test_quantized_model_reads_nearly_the_same() -> None:
    gguf = tiny_model("llama", n_embd=256).gguf
    read = []
    for path in (gguf, quantized(gguf, "Q8_0")):
        with LlamaEngine(path, n_ctx=256, n_threads=1) as engine:
            read.append(np.stack(list(engine.mlp_outputs(TEXTS))).astype(np.float32))
    exact, rounded = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in read)
    assert np.sum(exact * rounded, axis=-1).min() > 0.99
    assert not np.array_equal(exact, rounded)


def test_architecture_without_down_projections_is_refused_by_name() -> None:
    reader = MlpOutputReader("rwkv7", n_layer=2, n_embd=64)
    reader.arm()
    with pytest.raises(ModelFileError, match=r"layer 0 .*'rwkv7'"):
        reader.learn()


def test_output_of_an_unexpected_width_is_an_error_and_no_wrong_tensor() -> None:
    with Model(tiny_model("llama").gguf) as model:
        reader = MlpOutputReader("llama", n_layer=3, n_embd=32)
        with Context(model, n_ctx=256, n_batch=63, n_threads=1, on_node=reader.on_node) as context:
            slots = Slots(context)
            slots.prefill(0, [5, 6, 7], before_last=reader.arm)
            reader.learn()
            slots.prefill(0, [5, 6, 8], before_last=reader.arm)
            with pytest.raises(ModelFileError, match="unexpected shape"):
                reader.take()
