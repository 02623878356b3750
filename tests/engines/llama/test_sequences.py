from __future__ import annotations

import numpy as np
import pytest

from alignez_gguf.engines.llama.sequences import (
    EXACT_CHUNK_TOKENS,
    FAST_CHUNK_TOKENS,
    UNSTEERED,
    Sequences,
    SequenceSteering,
)
from alignez_gguf.runtime.model import Model
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    with Model(tiny_model("llama").gguf) as model:
        yield model


@pytest.fixture
def sequences(model: Model):  # type: ignore[no-untyped-def]
    sequences = Sequences(model, n_ctx=256, n_sequences=3, n_threads=1)
    yield sequences
    sequences.close()


PROMPT = list(range(10, 110))


@pytest.mark.parametrize(
    ("one", "other", "until"),
    [
        (SequenceSteering(), SequenceSteering(), float("inf")),
        (SequenceSteering(0.0, 5), SequenceSteering(0.0, 9), float("inf")),
        (SequenceSteering(1.0, 5), SequenceSteering(1.0, 5), float("inf")),
        (SequenceSteering(1.0, 5), SequenceSteering(0.5, 9), 5),
        (SequenceSteering(1.0, 5), SequenceSteering(1.0, 9), 5),
        (SequenceSteering(1.0, 5), SequenceSteering(), 5),
        (SequenceSteering(), SequenceSteering(0.5, 0), 0),
        (SequenceSteering(1.0, 5, 8), SequenceSteering(1.0, 5), 8),
        (SequenceSteering(1.0, 5, control=0), SequenceSteering(1.0, 5, control=1), 5),
        (SequenceSteering(1.0, 5, 8, control=0), SequenceSteering(1.0, 9, control=1), 5),
        (SequenceSteering(0.0, 5, control=0), SequenceSteering(0.0, 9, control=1), float("inf")),
    ],
)
def test_steering_agrees_until_a_position_gets_another_strength(
    one: SequenceSteering, other: SequenceSteering, until: float
) -> None:
    assert one.agrees_until(other) == until
    assert other.agrees_until(one) == until


def test_common_prefix_is_computed_once(sequences: Sequences, batches: list[int]) -> None:
    sequences.prefill(0, PROMPT)
    sequences.prefill(1, [*PROMPT[:80], *range(200, 220)])
    assert sum(batches) == 100 + 20


def test_prefix_is_not_reused_under_other_steering(sequences: Sequences, batches: list[int]) -> None:
    sequences.prefill(0, PROMPT, SequenceSteering(1.0, first=40))
    sequences.prefill(1, PROMPT, UNSTEERED)
    assert sum(batches) == 100 + 60
    sequences.prefill(2, PROMPT, SequenceSteering(1.0, first=40))
    assert sum(batches) == 160 + 2


def test_copy_of_a_sequence_goes_on_as_the_sequence_itself(sequences: Sequences) -> None:
    sequences.prefill(0, PROMPT)
    sequences.copy_sequence(0, 2)
    sequences.copy_sequence(2, 1)
    sequences.decode([7, 7])
    np.testing.assert_array_equal(*(sequences.context.logits(index) for index in range(2)))


def test_cleared_sequences_share_nothing(sequences: Sequences, batches: list[int]) -> None:
    sequences.prefill(0, PROMPT)
    sequences.clear()
    sequences.prefill(0, PROMPT)
    assert sum(batches) == 200


@pytest.mark.parametrize(
    "length", [1, 2, EXACT_CHUNK_TOKENS, EXACT_CHUNK_TOKENS + 1, 2 * EXACT_CHUNK_TOKENS + 1]
)
def test_reusing_a_prefix_changes_no_bit(sequences: Sequences, length: int) -> None:
    whole = list(range(10, 10 + length + 20))
    alone = sequences.context.logits(sequences.prefill(0, whole)).copy()
    sequences.clear()
    sequences.prefill(0, [*whole[:length], 5, 6, 7])
    assert (sequences.context.logits(sequences.prefill(1, whole)) == alone).all()


@pytest.mark.parametrize(("exact", "size"), [(True, EXACT_CHUNK_TOKENS), (False, FAST_CHUNK_TOKENS)])
def test_chunks_are_few_and_even(model: Model, exact: bool, size: int) -> None:
    sequences = Sequences(model, n_ctx=256, n_threads=1, exact=exact)
    for length in range(2, 2 * FAST_CHUNK_TOKENS):
        lengths = [len(chunk.tokens) for chunk in sequences.plan(0, [1] * length, length - 1)]
        assert sum(lengths) == length
        assert len(lengths) == -(-length // size)
        assert max(lengths) - min(lengths) <= 1
        assert 2 <= min(lengths) <= max(lengths) <= size
    sequences.close()
