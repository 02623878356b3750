"""What a context holds of a sequence, in another context."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from tests.models import tiny_model

TEXT = list(range(10, 50))
OTHER = list(range(60, 75))
END = [5, 6, 7]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model(tiny_model("llama").gguf) as model:
        yield model


def opened(model: Model, n_sequences: int, n_ctx: int = 256) -> Context:
    return Context(model, n_ctx=n_ctx, n_sequences=n_sequences, n_batch=64, n_threads=1)


def compute(context: Context, sequence: int, tokens: list[int], begin: int = 0) -> NDArray[np.float32]:
    """The logits after the last of these tokens."""
    n_tokens = len(tokens)
    positions = range(begin, begin + n_tokens)
    outputs = [index == n_tokens - 1 for index in range(n_tokens)]
    context.decode(tokens, list(positions), [sequence] * n_tokens, outputs)
    return context.logits(n_tokens - 1).copy()


@pytest.mark.parametrize(
    ("source", "target"), [((1, 0), (1, 0)), ((4, 3), (2, 1)), ((2, 0), (5, 2)), ((3, 1), (3, 1))]
)
def test_text_goes_on_in_another_context_to_the_same_bits(
    model: Model, source: tuple[int, int], target: tuple[int, int]
) -> None:
    with opened(model, source[0]) as context:
        for sequence in range(source[0]):
            compute(context, sequence, TEXT if sequence == source[1] else OTHER)
        saved = context.save_sequence(source[1])
        expected = compute(context, source[1], END, len(TEXT))
    assert saved is not None
    with opened(model, target[0]) as context:
        for sequence in range(target[0]):
            compute(context, sequence, OTHER)
        others = [context.save_sequence(sequence) for sequence in range(target[0]) if sequence != target[1]]
        assert context.load_sequence(target[1], saved)
        found = compute(context, target[1], END, len(TEXT))
        assert others == [
            context.save_sequence(sequence) for sequence in range(target[0]) if sequence != target[1]
        ]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("wrong", ["cut", "longer", "too many cells", "other type"])
def test_what_cannot_be_loaded_leaves_the_sequence_empty(model: Model, wrong: str) -> None:
    with Context(
        model,
        n_ctx=512,
        n_sequences=2,
        n_batch=512,
        n_threads=1,
        f32_cache=wrong == "other type",
    ) as context:
        compute(context, 0, list(range(10, 310)) if wrong == "too many cells" else TEXT)
        saved = context.save_sequence(0)
    assert saved is not None
    with opened(model, 1) as context:
        expected = compute(context, 0, TEXT)
        saved = {"cut": saved[:-3], "longer": saved + b"abc"}.get(wrong, saved)
        assert not context.load_sequence(0, saved)
        np.testing.assert_array_equal(compute(context, 0, TEXT), expected)


def test_models_with_layers_that_see_only_the_last_tokens_are_not_saved() -> None:
    with Model(tiny_model("gemma3").gguf) as model, opened(model, 2) as context:
        compute(context, 0, TEXT)
        assert context.save_sequence(0) is None


def test_state_of_another_form_is_not_saved_even_if_it_is_as_long(model: Model) -> None:
    with opened(model, 2) as context:
        compute(context, 0, TEXT)
        assert context.save_sequence(0) is not None
        # As of recurrent layers, where the number of cells is in the place of that of the streams.
        context._empty_state = context._empty_state[:8] + bytes(len(context._empty_state) - 8)
        assert context.save_sequence(0) is None
