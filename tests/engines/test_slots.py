from __future__ import annotations

import pytest

from alignez_gguf.engines.slots import (
    EXACT_PIECE,
    FAST_PIECE,
    UNSTEERED,
    Slots,
    Treatment,
    in_whole_rows,
)
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    with Model(tiny_model("llama").gguf) as model:
        yield model


@pytest.fixture
def context(model: Model):  # type: ignore[no-untyped-def]
    with Context(model, n_ctx=256, n_sequences=3, n_batch=64, n_threads=1) as context:
        yield context


PROMPT = list(range(10, 110))


@pytest.mark.parametrize(
    ("one", "other", "until"),
    [
        (Treatment(), Treatment(), float("inf")),
        (Treatment(0.0, 5), Treatment(0.0, 9), float("inf")),
        (Treatment(1.0, 5), Treatment(1.0, 5), float("inf")),
        (Treatment(1.0, 5), Treatment(0.5, 9), 5),
        (Treatment(1.0, 5), Treatment(1.0, 9), 5),
        (Treatment(1.0, 5), Treatment(), 5),
        (Treatment(), Treatment(0.5, 0), 0),
        (Treatment(1.0, 5, 8), Treatment(1.0, 5), 8),
        (Treatment(1.0, 5, control=0), Treatment(1.0, 5, control=1), 5),
        (Treatment(1.0, 5, 8, control=0), Treatment(1.0, 9, control=1), 5),
        (Treatment(0.0, 5, control=0), Treatment(0.0, 9, control=1), float("inf")),
    ],
)
def test_treatments_agree_until_a_position_gets_another_strength(
    one: Treatment, other: Treatment, until: float
) -> None:
    assert one.agrees_until(other) == until
    assert other.agrees_until(one) == until


def test_common_prefix_is_computed_once(context: Context, batches: list[int]) -> None:
    slots = Slots(context)
    slots.prefill(0, PROMPT)
    slots.prefill(1, [*PROMPT[:80], *range(200, 220)])
    assert sum(batches) == 100 + 20


def test_part_of_a_prompt_is_not_taken_over_from_another_treatment(
    context: Context, batches: list[int]
) -> None:
    slots = Slots(context)
    slots.prefill(0, PROMPT, Treatment(1.0, first=40))
    slots.prefill(1, PROMPT, UNSTEERED)
    assert sum(batches) == 100 + 60
    slots.prefill(2, PROMPT, Treatment(1.0, first=40))
    assert sum(batches) == 160 + 2


def test_cleared_slots_share_nothing(context: Context, batches: list[int]) -> None:
    slots = Slots(context)
    slots.prefill(0, PROMPT)
    slots.clear()
    slots.prefill(0, PROMPT)
    assert sum(batches) == 200


@pytest.mark.parametrize("length", [1, 2, EXACT_PIECE, EXACT_PIECE + 1, 2 * EXACT_PIECE + 1])
def test_taking_over_a_prefix_changes_no_bit(context: Context, length: int) -> None:
    slots = Slots(context)
    whole = list(range(10, 10 + length + 20))
    alone = context.logits(slots.prefill(0, whole)).copy()
    slots.clear()
    slots.prefill(0, [*whole[:length], 5, 6, 7])
    assert (context.logits(slots.prefill(1, whole)) == alone).all()


@pytest.mark.parametrize("size", [EXACT_PIECE, FAST_PIECE])
def test_pieces_are_few_even_and_of_four_tokens_each_but_for_the_last(context: Context, size: int) -> None:
    slots = Slots(context, piece=size)
    for length in range(2, 2 * FAST_PIECE):
        tokens = [1] * length
        lengths = [len(piece.tokens) for piece in slots.plan(0, tokens, length - 1)]
        assert sum(lengths) == length
        assert len(lengths) == -(-length // size)
        assert max(lengths) - lengths[-1] < 8
        assert max(lengths) <= size
        assert not any(count % 4 for count in lengths[:-1])


def test_pieces_of_unequal_length_are_not_computed_together(context: Context) -> None:
    slots = Slots(context)
    pieces = [slots.plan(slot, [1] * (5 + slot), 4)[0] for slot in range(2)]
    with pytest.raises(ValueError, match="as many tokens each"):
        slots.compute_together(pieces)


def test_tokens_in_whole_rows() -> None:
    assert [in_whole_rows(count) for count in range(10)] == [0, 1, 2, 3, 4, 4, 4, 4, 8, 8]
