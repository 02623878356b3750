from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.llama import sequences
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.engines.llama.sequences import EXACT_CHUNK_TOKENS, Sequences
from alignez_gguf.errors import ModelFileError, QueryError
from alignez_gguf.readout import Hook, Readout
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.graph import BlockOutputs, MlpOutputs, Tensor, operation_of
from alignez_gguf.runtime.layer_reader import LayerReader
from alignez_gguf.runtime.model import Model
from tests.models import (
    ARCHITECTURES,
    EXPERTS_WITH_BIAS,
    OUT_OF_REACH,
    TinyModel,
    quantized,
    tiny_model,
    tokenizer,
)

SHARED = "Question: how do I bake a cake?\nAnswer: make a plan, work slowly and mind the oven.\n" * 3
PASSAGES = [
    Passage(f"{SHARED}Question: why?\nAnswer:", " sorry, that is not something that I can help with." * 4),
    Passage(f"{SHARED}Question: why?\nAnswer:", " make a plan"),
    Passage(f"{SHARED}Question: how?", ""),
    Passage("x"),
    Passage("", "The quick brown fox"),
    Passage("The quick brown fox jumps over", " the lazy dog"),
]
TEXTS = [passage.text for passage in PASSAGES]
READOUTS = [Readout(hook, pooling) for hook, pooling in product(("mlp", "residual"), ("last", "mean"))]
LAST = [Readout()]

FLOAT16 = 2.0**-11
"""Half the distance of neighbouring numbers in float16, relative."""


def n_tokens(text: str) -> int:
    return len(tokenizer().encode(text)) if text else 0


def hooked(tiny: TinyModel, passage: Passage, readout: Readout) -> NDArray[np.float32]:
    """What PyTorch's MLPs or blocks put out, [n_layer, n_embd]."""
    outputs: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for module in (tiny.mlp_modules if readout.hook == "mlp" else tiny.blocks)
    ]
    tiny.hf(torch.tensor([tokenizer().encode(passage.text)]))
    for handle in handles:
        handle.remove()
    rows = [
        (output[0] if isinstance(output, tuple) else output).reshape(-1, tiny.hf.config.hidden_size)
        for output in outputs
    ]
    first = min(n_tokens(passage.prompt), len(rows[0]) - 1) if readout.pooling == "mean" else -1
    return torch.stack([row[first:].mean(0) for row in rows]).numpy()


def logprobs(tiny: TinyModel, text: str) -> NDArray[np.float32]:
    """Log-probabilities [n_tokens, n_vocab] of what follows each token."""
    logits = tiny.hf(torch.tensor([tokenizer().encode(text)])).logits[0]
    return torch.log_softmax(logits, -1).numpy()


@pytest.fixture
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in F32."""
    monkeypatch.setattr(sequences, "Context", lambda *args, **kw: Context(*args, **kw, f32_cache=True))


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, EXPERTS_WITH_BIAS, OUT_OF_REACH])
def test_activations_are_what_hooks_on_the_modules_see(architecture: str) -> None:
    tiny = tiny_model(architecture)
    with LlamaEngine(tiny.gguf, n_ctx=256, n_threads=1) as engine:
        for passage, arrays in zip(PASSAGES, engine.activations(PASSAGES, READOUTS), strict=True):
            for readout, array in zip(READOUTS, arrays, strict=True):
                expected = hooked(tiny, passage, readout)
                # llama.cpp looks up gemma's GELU in a table of float16.
                base = 2e-3 if architecture == "gemma3" else 2e-5
                np.testing.assert_allclose(
                    array.astype(np.float32), expected, rtol=FLOAT16, atol=base * np.abs(expected).max()
                )


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(tiny_model("llama").gguf, n_ctx=256, n_threads=1) as engine:
        yield engine


def test_engine_reads_passages_in_order_one_at_a_time(engine: LlamaEngine) -> None:
    tiny = tiny_model("llama")
    outputs = engine.activations(PASSAGES, LAST)
    for passage in PASSAGES:
        (found,) = next(outputs)
        expected = hooked(tiny, passage, Readout())
        assert found.dtype == np.float16
        assert found.shape == (3, 64)
        # The engine's KV cache is in float16.
        np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
    assert next(outputs, None) is None


def test_reading_depends_neither_on_what_was_read_before_nor_on_other_readouts(engine: LlamaEngine) -> None:
    together = list(engine.activations(PASSAGES, READOUTS))
    for passage, arrays in zip(reversed(PASSAGES), reversed(together), strict=True):
        for readout, expected in zip(READOUTS, arrays, strict=True):
            ((found,),) = engine.activations([passage], [readout])
            np.testing.assert_array_equal(found, expected)


def test_readouts_may_take_turns(engine: LlamaEngine) -> None:
    together = list(engine.activations(PASSAGES, READOUTS))
    turns = [engine.activations(PASSAGES, [readout]) for readout in READOUTS]
    for arrays in together:
        for expected, turn in zip(arrays, turns, strict=True):
            np.testing.assert_array_equal(next(turn)[0], expected)


def test_prompt_that_is_read_before_responses_to_it_is_computed_once(
    engine: LlamaEngine, batches: list[int]
) -> None:
    prompts = [f"{SHARED}Question: {word}?\nAnswer:" for word in ("why", "how")]
    answers = [Passage(prompt, f" {answer}") for prompt in prompts for answer in ("sorry", "make a plan")]
    read = list(engine.activations(list(map(Passage, prompts)), LAST))
    fits = list(engine.response_logprobs(answers))
    list(engine.activations([Passage("x")], LAST))
    batches.clear()
    reading = engine.activations(list(map(Passage, prompts)), LAST)
    fitting = engine.response_logprobs(answers)
    for row in range(2):
        np.testing.assert_array_equal(next(reading), read[row])
        assert [next(fitting), next(fitting)] == fits[2 * row : 2 * row + 2]
    # Of each answer, the last token of the prompt again, and all that is answered but its last token.
    responses = sum(n_tokens(answer.text) - n_tokens(answer.prompt) for answer in answers)
    shared = n_tokens(f"{SHARED}Question:")
    assert sum(batches) <= n_tokens(prompts[0]) + n_tokens(prompts[1]) - shared + responses + 2 * len(answers)


def test_next_token_logprobs_are_those_of_the_model(engine: LlamaEngine) -> None:
    tiny = tiny_model("llama")
    for text, found in zip(TEXTS, engine.next_token_logprobs(TEXTS), strict=True):
        np.testing.assert_allclose(found, logprobs(tiny, text)[-1], atol=2e-2)
        assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)


def test_logprobs_may_follow_a_reading_that_leaves_the_head_out(engine: LlamaEngine) -> None:
    (expected,) = engine.next_token_logprobs(TEXTS[:1])
    list(engine.activations(PASSAGES[:1], [Readout(pooling="mean")]))
    (found,) = engine.next_token_logprobs(TEXTS[:1])
    np.testing.assert_array_equal(found, expected)


ANSWERED = [PASSAGES[0], PASSAGES[1], PASSAGES[5], PASSAGES[0]]


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize("max_tokens", [None, 1, 5, 100])
def test_response_logprobs_are_those_of_the_model(max_tokens: int | None) -> None:
    tiny = tiny_model("llama")
    with LlamaEngine(tiny.gguf, n_ctx=256, n_threads=1) as engine:
        found = list(engine.response_logprobs(ANSWERED, max_tokens=max_tokens))
    for passage, value in zip(ANSWERED, found, strict=True):
        tokens, first = tokenizer().encode(passage.text), n_tokens(passage.prompt)
        table = logprobs(tiny, passage.text)
        each = [table[at - 1, tokens[at]] for at in range(first, len(tokens))]
        assert value == pytest.approx(sum(each[:max_tokens]), rel=1e-4)


def test_response_logprob_does_not_depend_on_what_was_read_before(engine: LlamaEngine) -> None:
    together = list(engine.response_logprobs(ANSWERED))
    assert together[0] == together[3]
    for passage, expected in zip(reversed(ANSWERED), reversed(together), strict=True):
        assert list(engine.response_logprobs([passage])) == [expected]


def test_response_that_is_predicted_from_the_end_of_a_chunk_is_as_any_other() -> None:
    """In the last layer that token would be computed alone, by another kernel."""
    half = EXACT_CHUNK_TOKENS - 12
    letters = "QZXJKVWY" * 20
    passage = Passage(letters[:half], letters[half : 2 * half + 1])  # computed in two chunks of `half` tokens
    assert n_tokens(passage.prompt) == half
    with LlamaEngine(tiny_model("llama", n_embd=256).gguf, n_ctx=256, n_threads=1) as engine:
        list(engine.activations([Passage(letters[:20])], LAST))
        shifted = list(engine.response_logprobs([passage]))
        list(engine.activations([Passage("x")], LAST))
        assert list(engine.response_logprobs([passage])) == shifted


@pytest.mark.parametrize(
    ("passage", "message"),
    [(Passage("x", ""), "'x' has no response"), (Passage("", "x"), "'x' has no prompt")],
)
def test_response_that_cannot_be_predicted_is_refused(
    engine: LlamaEngine, passage: Passage, message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        engine.response_logprobs([passage])


def test_text_that_does_not_fit_is_refused_before_anything_is_read(engine: LlamaEngine) -> None:
    with pytest.raises(QueryError, match=r"takes \d+ tokens, more than the context of 256"):
        engine.activations([Passage("x"), Passage("why", " why" * 200)], LAST)


def test_quantized_model_reads_nearly_the_same() -> None:
    gguf = tiny_model("llama", n_embd=256).gguf
    read = []
    for path in (gguf, quantized(gguf, "Q8_0")):
        with LlamaEngine(path, n_ctx=256, n_threads=1) as engine:
            read.append(np.stack(list(engine.activations(PASSAGES, LAST))).astype(np.float32))
    exact, rounded = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in read)
    assert np.sum(exact * rounded, axis=-1).min() > 0.99
    assert not np.array_equal(exact, rounded)


def learned(reader: LayerReader, on_model: str = "llama") -> LayerReader:
    """A reader that has seen the graph of a model."""
    with Model(tiny_model(on_model).gguf) as model:
        sequence = Sequences(model, n_ctx=256, n_threads=1, on_node=reader.on_node)
        with closing(sequence):
            reader.learn(lambda: sequence.prefill(0, [5, 6, 7]))
    return reader


@pytest.mark.parametrize(
    ("hook", "name"), [("mlp", "MLP output"), ("residual", "residual stream at the end")]
)
def test_output_that_a_layer_lacks_is_refused_by_name(hook: Hook, name: str) -> None:
    reader = learned(LayerReader(ModelInfo("rwkv7", 64, 4)))
    with (
        pytest.raises(ModelFileError, match=f"the {name} of layer 3 .*'rwkv7'"),
        reader.reading([Readout(hook)]),
    ):
        pass


def test_hooks_are_what_is_found_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert learned(LayerReader(ModelInfo("llama", 64, 3))).hooks == {"mlp", "residual"}
    assert learned(LayerReader(ModelInfo("llama", 64, 4))).hooks == set()
    with LlamaEngine(tiny_model("llama").gguf, n_ctx=256, n_threads=1) as engine:
        monkeypatch.setattr(BlockOutputs, "of_layer", {})
        assert engine.hooks == {"mlp"}
        assert next(engine.activations(PASSAGES, LAST)).shape == (1, 3, 64)
        with pytest.raises(ModelFileError, match=r"layer 0 .*; read elsewhere \(--hook mlp\) or use"):
            next(engine.activations(PASSAGES, [Readout("residual")]))


@cache
def operations() -> dict[bytes, int]:
    """The numbers of ggml's first operations by their names."""
    tensors = [Tensor(op=number) for number in range(40)]
    return {operation_of(ctypes.addressof(tensor)): tensor.op for tensor in tensors}


class Graph:
    """Shows a finder a graph of tensors that hold nothing."""

    def __init__(self, finder: BlockOutputs | MlpOutputs) -> None:
        self._finder = finder
        self._tensors: list[Tensor] = []

    def leaf(self, name: str) -> int:
        self._tensors.append(Tensor(name=name.encode(), ne=(64, 1, 1, 1)))
        return ctypes.addressof(self._tensors[-1])

    def node(self, name: str, *sources: int, operation: bytes = b"NONE") -> int:
        address = self.leaf(name)
        self._tensors[-1].op = operations()[operation]
        for index, source in enumerate(sources):
            self._tensors[-1].src[index] = source
        self._finder.visit(address)
        return address

    def block(self, layer: int, stream: int) -> int:
        """A block with a residual; its output."""
        weight = self.leaf(f"blk.{layer}.ffn_down.weight")
        return self.node(f"l_out-{layer}", self.node("product", weight, stream), stream)

    def head(self, stream: int) -> int:
        return self.node(
            "result_norm", self.node("norm", self.node("rows", stream)), self.leaf("output_norm.weight")
        )


@pytest.mark.parametrize("vectors", ["leaf_{}", "CUDA0#leaf_{}#0"])
def test_what_an_edit_adds_is_a_part_of_the_mlp_output_and_what_else_is_added_is_not(vectors: str) -> None:
    finder = MlpOutputs(n_embd=64)
    graph = Graph(finder)

    def times(weight: str, x: int) -> int:
        return graph.node("", graph.leaf(weight), x, operation=b"MUL_MAT")

    def total(x: int, y: int) -> int:
        return graph.node("", x, y, operation=b"ADD")

    stream, strength = graph.leaf("inp_embd"), graph.leaf(vectors.format(0))
    output = times("blk.0.ffn_down.weight", stream)
    along = graph.node("", times(vectors.format(1), output), strength, operation=b"MUL")
    edited = total(total(output, times(vectors.format(2), along)), times(vectors.format(3), strength))
    total(edited, total(stream, times("blk.0.attn_output.weight", stream)))
    other = times("blk.1.ffn_down.weight", edited)
    total(other, times("inp_mask", strength))

    assert finder.of_layer == {0: edited, 1: other}


def test_block_outputs_are_found_behind_copies_between_devices_too() -> None:
    finder = BlockOutputs(n_layer=2)
    graph = Graph(finder)
    first = graph.block(0, graph.leaf("inp_embd"))
    second = graph.block(1, graph.leaf("CUDA1#l_out-0#0"))
    graph.head(second)
    assert finder.of_layer == {0: first, 1: second}


def test_block_output_that_something_bypasses_is_not_found() -> None:
    finder = BlockOutputs(n_layer=2)
    graph = Graph(finder)
    first = graph.block(0, graph.leaf("inp_embd"))
    aside = graph.node("aside", graph.leaf("blk.0.attn_v.weight"), graph.leaf("inp_embd"))
    second = graph.node("l_out-1", graph.block(1, first), aside)
    graph.head(second)
    assert finder.of_layer == {1: second}


@pytest.mark.parametrize("weight", ["blk.0.ffn_post_norm.weight", "inp_scale"])
def test_block_output_that_its_layer_changes_further_is_not_found(weight: str) -> None:
    finder = BlockOutputs(n_layer=1)
    graph = Graph(finder)
    output = graph.block(0, graph.leaf("inp_embd"))
    graph.head(graph.node("scaled", output, graph.leaf(weight)))
    assert (0 in finder.of_layer) == (weight == "inp_scale")


@pytest.mark.parametrize(("hook", "reason"), [("mlp", "cannot be found"), ("residual", "unexpected shape")])
def test_output_of_an_unexpected_width_is_an_error_and_no_wrong_tensor(hook: Hook, reason: str) -> None:
    with Model(tiny_model("llama").gguf) as model:
        reader = LayerReader(ModelInfo("llama", 32, 3))
        sequence = Sequences(model, n_ctx=256, n_threads=1, on_node=reader.on_node)
        with closing(sequence):
            reader.learn(lambda: sequence.prefill(0, [5, 6, 7]))

            def read() -> None:
                with reader.reading([Readout(hook)]):
                    reader.arm(1)
                    sequence.prefill(0, [5, 6, 8])
                    reader.take()

            with pytest.raises(ModelFileError, match=reason):
                read()
