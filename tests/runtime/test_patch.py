"""The patch of llama.cpp, called as C, against PyTorch with forward hooks on the same random weights.

Without the patch these tests fail: they are there to prove it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit, orthonormal_rows
from alignez_gguf.errors import SteeringError
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.bindings import captured_log
from tests.models import ARCHITECTURES, EXPERTS_WITH_BIAS, OUT_OF_REACH, TinyModel, quantized, tiny_model
from tests.runtime import gpu
from tests.runtime.context import Context, DecodeError, Row, log_lines, rows, steered_difference
from tests.runtime.gpu import same_bits, tolerance
from tests.runtime.oracle import hooked_logits, nested_logits

N_EMBD, N_LAYER = 64, 3
LAYERS = range(N_LAYER)
RNG = np.random.default_rng(0)
TOKENS = [int(token) for token in RNG.integers(5, 380, 40)]
PARITY = 5e-5
"""Largest difference to PyTorch; both sum in float32, in another order."""
ROUNDING = tolerance(1e-5)
"""Largest difference between two ways to batch the same tokens; the kernels for one row and for many sum in
another order, steered or not."""


def vectors(rank: int) -> NDArray[np.float32]:
    return RNG.standard_normal((rank, N_EMBD)).astype(np.float32)


def addition() -> NDArray[np.float32]:
    return 0.3 * vectors(1)[0]


EDITS = {
    "rank 1 from layer 0": {0: LayerEdit(remove=vectors(1))},
    "rank 3 from some layers": {layer: LayerEdit(remove=vectors(3)) for layer in (0, 2)},
    "an addition to layer 0": {0: LayerEdit(add=addition())},
    "additions to all layers": {layer: LayerEdit(add=addition()) for layer in LAYERS},
    "both, on all layers": {layer: LayerEdit(remove=vectors(3), add=addition()) for layer in LAYERS},
    "boosts about a centre": {
        layer: LayerEdit.about(vectors(rank), addition(), gain)
        for layer, rank, gain in ((0, 1, 0.5), (1, 3, 1.0), (2, 1, 5.0))
    },
    "boosts by 5 about a centre, of rank 3": {1: LayerEdit.about(vectors(3), addition(), 5.0)},
    "biases of the MLPs of all layers": {layer: LayerEdit(bias=addition()) for layer in LAYERS},
    "everything at once": {
        layer: LayerEdit(addition(), orthonormal_rows(vectors(3)), np.array([-1, 0.5, 2]), addition())
        for layer in LAYERS
    },
}
ALL = EDITS["both, on all layers"]
OF_RANK = {rank: {layer: LayerEdit(remove=vectors(rank)) for layer in LAYERS} for rank in (1, 3, 4, 16)}
RANK_1 = OF_RANK[1]
OTHER = {1: LayerEdit(remove=vectors(2), add=addition())}
NESTED = [ALL, EDITS["rank 3 from some layers"], OTHER]


@cache
def model(architecture: str) -> TinyModel:
    # Rounding may decide between two experts; where TF32 rounds, all of them are asked.
    mixtures = ("mixtral", "qwen2moe", "deepseek2", "deepseek3", EXPERTS_WITH_BIAS)
    all_experts = {"num_experts_per_tok": 4} if gpu.LAYERS and architecture in mixtures else {}
    return tiny_model(architecture, n_layer=N_LAYER, n_embd=N_EMBD, **all_experts)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, EXPERTS_WITH_BIAS])
def any_architecture(request: pytest.FixtureRequest) -> Iterator[tuple[TinyModel, Context, float]]:
    """A model, its context, and how far the unsteered model is from PyTorch."""
    tiny = model(request.param)
    with Context(tiny.gguf) as context:
        floor = difference(context.logits(rows(TOKENS)), hooked_logits(tiny, TOKENS, {}))
        yield tiny, context, floor


@pytest.fixture
def llama() -> Iterator[Context]:
    with Context(model("llama").gguf) as context:
        yield context


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def fresh_logits(
    edits: dict[int, LayerEdit],
    strength: float = 1.0,
    first: int = 0,
    end: int | None = None,
    batch: Sequence[Row] | None = None,
) -> NDArray[np.float32]:
    """Of a context that never had other edits."""
    with Context(model("llama").gguf) as context:
        if edits:
            context.set_edits(edits)
            context.set_strength(strength, first=first, end=end)
        return context.logits(batch or rows(TOKENS))


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_edits_equal_forward_hooks(
    any_architecture: tuple[TinyModel, Context, float], edits: dict[int, LayerEdit]
) -> None:
    tiny, context, floor = any_architecture
    context.set_edits(edits)

    steered = context.logits(rows(TOKENS))

    expected = hooked_logits(tiny, TOKENS, edits)
    # The GELU table of ggml holds halves, so gemma is as far from PyTorch without an edit.
    assert difference(steered, expected) < max(PARITY, 2 * floor)
    assert difference(expected, hooked_logits(tiny, TOKENS, {})) > 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen2moe", "gemma3"])
def test_two_threads_compute_edits_as_forward_hooks_do(architecture: str) -> None:
    tiny = model(architecture)
    with Context(tiny.gguf, n_threads=2) as context:
        base = context.logits(rows(TOKENS))
        floor = difference(base, hooked_logits(tiny, TOKENS, {}))
        context.set_edits(ALL)
        context.set_strength(0.5, first=7, end=33)
        steered = context.logits(rows(TOKENS))
        context.set_strength(0.0)
        off = context.logits(rows(TOKENS))

    expected = hooked_logits(tiny, TOKENS, ALL, [0.0] * 7 + [0.5] * 26 + [0.0] * 7)
    assert difference(steered, expected) < max(PARITY, 2 * floor)
    assert same_bits(off, base)


def test_strengths_and_position_ranges_equal_forward_hooks(
    any_architecture: tuple[TinyModel, Context, float],
) -> None:
    tiny, context, floor = any_architecture
    context.set_edits(ALL)
    context.set_strength(0.5, first=7, end=20)

    steered = context.logits(rows(TOKENS))

    expected = hooked_logits(tiny, TOKENS, ALL, [0.0] * 7 + [0.5] * 13 + [0.0] * 20)
    assert difference(steered, expected) < max(PARITY, 2 * floor)


def test_nested_controls_equal_nested_forward_hooks(
    any_architecture: tuple[TinyModel, Context, float],
) -> None:
    tiny, context, floor = any_architecture
    context.set_controls(NESTED)
    context.set_strength(0.5, control=1, first=7, end=20)
    context.set_strength(0.8, control=2)
    strengths = [1.0, [0.0] * 7 + [0.5] * 13 + [0.0] * 20, 0.8]

    steered = context.logits(rows(TOKENS))

    expected = nested_logits(tiny, TOKENS, list(zip(NESTED, strengths, strict=True)))
    assert difference(steered, expected) < max(PARITY, 2 * floor)
    other_order = nested_logits(tiny, TOKENS, list(zip(NESTED, strengths, strict=True))[::-1])
    assert difference(other_order, expected) > 1e-3


def test_a_control_at_strength_zero_beside_another_does_nothing_bit_for_bit(llama: Context) -> None:
    llama.set_controls([ALL, OTHER])
    llama.set_strength(0.5, control=0)
    llama.set_strength(0.0, control=1)
    assert same_bits(llama.logits(rows(TOKENS)), fresh_logits(ALL, 0.5))


def test_sequences_of_one_batch_differ_in_which_controls_steer_them(llama: Context) -> None:
    llama.set_controls([ALL, OTHER])
    llama.set_strength(0.0, control=1, sequence=0)
    llama.set_strength(0.0, control=0, sequence=1)

    together = llama.logits(rows(TOKENS) + rows(TOKENS, sequence=1))

    expected = np.concatenate([fresh_logits(ALL), fresh_logits(OTHER)])
    assert difference(together, expected) < ROUNDING


def test_strength_zero_and_cleared_edits_are_the_unsteered_model_bit_for_bit(
    any_architecture: tuple[TinyModel, Context, float],
) -> None:
    tiny, context, _ = any_architecture
    with Context(tiny.gguf) as never_steered:
        base = never_steered.logits(rows(TOKENS))
    context.set_edits(ALL)
    steered = context.logits(rows(TOKENS))

    context.set_strength(0.0)
    off = context.logits(rows(TOKENS))
    context.set_edits({})
    cleared = context.logits(rows(TOKENS))

    assert not same_bits(steered, base)
    assert same_bits(off, base)
    assert same_bits(cleared, base)


def test_unsteered_sequences_of_a_steered_batch_stay_as_they_are_bit_for_bit(llama: Context) -> None:
    both = rows(TOKENS) + rows(TOKENS, sequence=1)
    base = llama.logits(both)
    llama.set_edits(ALL)
    llama.set_strength(0.0, sequence=1)

    steered = llama.logits(both)

    assert same_bits(steered[len(TOKENS) :], base[len(TOKENS) :])
    assert difference(steered[: len(TOKENS)], base[: len(TOKENS)]) > 0.1


def test_sequences_of_one_batch_get_what_each_gets_alone(
    any_architecture: tuple[TinyModel, Context, float],
) -> None:
    _, context, floor = any_architecture
    context.set_edits(ALL)
    settings = [(0.0, 0, None), (0.5, 7, 20), (1.0, 0, None), (1.0, 39, None)]
    alone = []
    for strength, first, end in settings:
        context.set_strength(strength, first=first, end=end)
        alone.append(context.logits(rows(TOKENS)))
    batch = []
    for sequence, (strength, first, end) in enumerate(settings):
        context.set_strength(strength, sequence=sequence, first=first, end=end)
        batch += rows(TOKENS, sequence)

    together = context.logits(batch)

    assert difference(together, np.concatenate(alone)) < max(ROUNDING, floor)


def test_a_prompt_in_one_batch_equals_token_by_token(
    any_architecture: tuple[TinyModel, Context, float],
) -> None:
    _, context, _ = any_architecture

    def unlike() -> float:
        at_once = context.logits(rows(TOKENS))
        context.clear()
        return difference(at_once, np.concatenate([context.decode([row]) for row in rows(TOKENS)]))

    context.set_edits({})
    unsteered = unlike()
    for strength in (1.0, 0.5):
        context.set_controls([ALL, RANK_1])
        context.set_strength(strength)
        assert unlike() < max(ROUNDING, 2 * unsteered)


def test_only_rows_with_logits_and_micro_batches_change_nothing(
    any_architecture: tuple[TinyModel, Context, float],
) -> None:
    tiny, context, floor = any_architecture
    context.set_edits(ALL)
    context.set_strength(1.0, first=10)
    whole = context.logits(rows(TOKENS))
    # The last block computes rows with logits only; the second micro-batch of 16 has none at all.
    wanted = (3, 12, 39)
    few = [Row(token, position, output=position in wanted) for position, token in enumerate(TOKENS)]

    pruned = context.logits(few)
    with Context(tiny.gguf, micro_batch=16) as small:
        small.set_edits(ALL)
        small.set_strength(1.0, first=10)
        in_parts = small.logits(few)

    assert difference(pruned, whole[list(wanted)]) < max(ROUNDING, floor)
    assert difference(in_parts, whole[list(wanted)]) < max(ROUNDING, floor)


@pytest.mark.parametrize("edits", OF_RANK.values(), ids=OF_RANK)
def test_a_token_is_edited_alike_to_the_bit_whether_others_are_edited_with_it_or_not(
    llama: Context, edits: dict[int, LayerEdit]
) -> None:
    """CPUs multiply 4, 8, ... vectors with one token by another kernel than with several (`tinyBLAS::matmul`
    in ggml/src/ggml-cpu/llamafile/sgemm.cpp)."""
    both = rows(TOKENS) + rows(TOKENS, sequence=1)
    llama.set_edits(edits)
    llama.set_strength(0.7, first=len(TOKENS) - 1)
    with_others = llama.logits(both)

    llama.set_strength(0.0, sequence=1)
    alone = llama.logits(both)

    assert same_bits(alone[: len(TOKENS)], with_others[: len(TOKENS)])
    assert not same_bits(alone[-1], with_others[-1])


@pytest.mark.parametrize("edits", OF_RANK.values(), ids=OF_RANK)
@pytest.mark.parametrize("n_together", [2, 8, 15, 16, 20])
def test_vectors_edit_alike_to_the_bit_however_many_tokens_are_computed_together(
    llama: Context, edits: dict[int, LayerEdit], n_together: int
) -> None:
    llama.set_edits(edits)
    llama.set_strength(0.7)
    whole = llama.logits(rows(TOKENS))

    llama.clear()
    parts = [
        llama.decode(rows(TOKENS)[start : start + n_together]) for start in range(0, len(TOKENS), n_together)
    ]

    assert same_bits(np.concatenate(parts), whole)


def test_batches_that_differ_in_nothing_but_which_rows_are_edited_share_no_graph(llama: Context) -> None:
    llama.set_edits(ALL)
    # each differs from the one before it in the edited rows, or in those of the last block, which are outputs
    for first, outputs in [(3, (39,)), (13, (39,)), (13, (0, 13)), (13, (13, 20)), (3, (2, 3)), (3, (1, 3))]:
        batch = [Row(token, position, output=position in outputs) for position, token in enumerate(TOKENS)]
        llama.set_strength(0.5, first=first, end=first + 2)
        assert same_bits(llama.logits(batch), fresh_logits(ALL, 0.5, first, first + 2, batch))


# Alike in pairs: whichever of two acts on all rows and whichever on some, the number of nodes is the same.
@pytest.mark.parametrize("controls", [[ALL, ALL], [RANK_1, RANK_1], [*NESTED, RANK_1]])
def test_batches_that_are_edited_in_all_rows_in_some_or_in_none_take_turns(
    controls: list[dict[int, LayerEdit]],
) -> None:
    """ggml plans the memory of a graph anew only where the number of its nodes or a size changes
    (ggml_gallocr_needs_realloc in ggml/src/ggml-alloc.c), so no two graphs may differ in anything else."""
    random = np.random.default_rng(0)
    gguf = model("llama").gguf
    with Context(gguf, micro_batch=16) as context:
        context.set_controls(controls)
        for _ in range(60):
            n_tokens = int(random.choice([1, 2, 5, 16, 40]))
            settings = []
            for control, _ in enumerate(controls):
                first, end = sorted(int(position) for position in random.integers(0, n_tokens + 1, 2))
                strength = float(random.choice([0.0, 0.5, 1.0]))
                whole = bool(random.random() < 0.5)
                settings.append((control, strength, 0 if whole else first, None if whole else end))
            wanted = random.random(n_tokens) < random.choice([0.1, 1.0])
            wanted[-1] = True
            batch = [Row(TOKENS[i], i, output=bool(wanted[i])) for i in range(n_tokens)]
            with Context(gguf, micro_batch=16) as fresh:
                fresh.set_controls(controls)
                for one in (context, fresh):
                    for control, strength, first, end in settings:
                        one.set_strength(strength, control=control, first=first, end=end)
                assert same_bits(context.logits(batch), fresh.logits(batch)), settings


@pytest.mark.parametrize("former", [ALL, EDITS["additions to all layers"]], ids=["both", "additions"])
def test_an_edit_leaves_nothing_of_the_one_before_it(llama: Context, former: dict[int, LayerEdit]) -> None:
    llama.set_edits(former)
    llama.set_strength(0.3, first=5)
    llama.logits(rows(TOKENS))

    llama.set_edits(OTHER)

    assert same_bits(llama.logits(rows(TOKENS)), fresh_logits(OTHER))


def test_the_vectors_are_copied(llama: Context) -> None:
    add = addition()
    edit = bindings._layer_edit(1, 0, False, None, None, add)
    set_edit, _ = bindings._functions()
    assert set_edit(llama.pointer, ctypes.byref(edit), 1, N_EMBD) == 0
    expected = fresh_logits({1: LayerEdit(add=add)})

    add[:] = np.nan

    assert same_bits(llama.logits(rows(TOKENS)), expected)


def raw_edit(
    layer: int = 1, u: object = None, v: object = None, b: object = None, k: int = 0
) -> bindings._LayerEdit:
    """An edit that no `LayerEdit` would let through."""
    arrays = [None if a is None else np.ascontiguousarray(a, dtype=np.float32) for a in (u, v, b)]
    edit = bindings._layer_edit(layer, 0, True, *arrays)
    edit.k = k
    return edit


UNIT = np.eye(N_EMBD, dtype=np.float32)
WHOLE = UNIT[:1]
BAD_EDITS: dict[str, tuple[int, list[bindings._LayerEdit]]] = {
    "a layer after the last": (N_EMBD, [raw_edit(N_LAYER, b=UNIT[0])]),
    "a negative layer": (N_EMBD, [raw_edit(-1, b=UNIT[0])]),
    "another width": (N_EMBD - 1, [raw_edit(b=UNIT[0])]),
    "NaN in b": (N_EMBD, [raw_edit(b=np.full(N_EMBD, np.nan))]),
    "infinity in b": (N_EMBD, [raw_edit(b=np.full(N_EMBD, np.inf))]),
    "NaN in U": (N_EMBD, [raw_edit(u=np.full(N_EMBD, np.nan), v=WHOLE, k=1)]),
    "infinity in V": (N_EMBD, [raw_edit(u=WHOLE, v=np.full(N_EMBD, np.inf), k=1)]),
    "more columns than dimensions": (N_EMBD, [raw_edit(u=UNIT, v=UNIT, k=N_EMBD + 1)]),
    "columns without U": (N_EMBD, [raw_edit(v=WHOLE, k=1)]),
    "columns without V": (N_EMBD, [raw_edit(u=WHOLE, k=1)]),
    "a count without columns": (N_EMBD, [raw_edit(k=1, b=UNIT[0])]),
    "columns without a count": (N_EMBD, [raw_edit(u=WHOLE, v=WHOLE, b=UNIT[0])]),
    "a negative count": (N_EMBD, [raw_edit(u=WHOLE, v=WHOLE, k=-1)]),
    "a layer without an edit": (N_EMBD, [raw_edit()]),
    "a good edit before a bad one": (
        N_EMBD,
        [raw_edit(0, b=UNIT[0]), raw_edit(1, b=np.full(N_EMBD, np.nan))],
    ),
}


@pytest.mark.parametrize(("n_embd", "edits"), BAD_EDITS.values(), ids=BAD_EDITS)
def test_a_bad_edit_is_refused_and_the_former_one_stays(
    llama: Context, n_embd: int, edits: list[bindings._LayerEdit]
) -> None:
    llama.set_edits(ALL)
    llama.set_strength(0.5)
    former = llama.logits(rows(TOKENS))
    set_edit, _ = bindings._functions()

    with captured_log() as log:
        status = set_edit(llama.pointer, (bindings._LayerEdit * len(edits))(*edits), len(edits), n_embd)

    assert status != 0
    assert any(reason in log.reason() for reason in ("invalid edit of layer", "is not finite", "n_embd"))
    assert same_bits(llama.logits(rows(TOKENS)), former)


@pytest.mark.parametrize(
    ("control", "sequence", "strength"),
    [(0, 0, -0.5), (0, 0, float("nan")), (0, 0, float("inf")), (0, 4, 1.0), (0, -1, -1.0), (1, 0, 1.0)],
    ids=["negative", "NaN", "infinite", "no such sequence", "negative for all", "no such control"],
)
def test_a_bad_strength_is_refused_and_the_former_one_stays(
    llama: Context, control: int, sequence: int, strength: float
) -> None:
    llama.set_edits(ALL)
    llama.set_strength(0.5)
    former = llama.logits(rows(TOKENS))
    _, set_strength = bindings._functions()

    with captured_log() as log:
        status = set_strength(llama.pointer, control, sequence, strength, -1, -1)

    assert status != 0
    assert "invalid sequence" in log.reason()
    assert same_bits(llama.logits(rows(TOKENS)), former)


def test_a_strength_needs_an_edit(llama: Context) -> None:
    with captured_log(), pytest.raises(SteeringError, match="no edit is set"):
        llama.set_strength(1.0)


def test_a_token_shared_by_sequences_of_different_strengths_fails_to_decode(llama: Context) -> None:
    llama.set_edits(ALL)
    llama.set_strength(0.5, sequence=1)
    shared = [Row(token, position, (0, 1)) for position, token in enumerate(TOKENS)]

    with pytest.raises(DecodeError, match="different edit strengths"):
        llama.logits(shared)

    llama.set_strength(1.0)
    assert difference(llama.logits(shared), fresh_logits(ALL)) < ROUNDING

    llama.set_controls([ALL, OTHER])
    llama.set_strength(0.5, control=1, sequence=1)
    with pytest.raises(DecodeError, match="different edit strengths"):
        llama.logits(shared)


def test_a_sequence_that_the_context_does_not_have_fails_to_decode(llama: Context) -> None:
    llama.set_edits(ALL)

    with pytest.raises(DecodeError, match="invalid seq_id"):
        llama.logits(rows(TOKENS, sequence=4))


def test_a_removal_out_of_reach_is_refused_and_the_former_edit_stays() -> None:
    with Context(model(OUT_OF_REACH).gguf) as context:
        context.set_edits(EDITS["additions to all layers"])
        former = context.logits(rows(TOKENS))

        with pytest.raises(SteeringError, match="layer 0 is out of reach"):
            context.set_edits(EDITS["rank 1 from layer 0"])

        expected = hooked_logits(model(OUT_OF_REACH), TOKENS, EDITS["additions to all layers"])
        assert difference(former, expected) < PARITY
        assert same_bits(context.logits(rows(TOKENS)), former)


@pytest.mark.parametrize(
    ("edit", "n_of_layer"),
    [
        (LayerEdit(remove=vectors(1)), 4),
        (LayerEdit(remove=vectors(3)), 4),
        (LayerEdit(add=addition()), 2),
        (LayerEdit(remove=vectors(3), add=addition()), 6),
    ],
    ids=["rank 1", "rank 3", "addition", "both"],
)
def test_only_edited_layers_add_nodes_to_the_graph_and_strengths_do_not(
    llama: Context, edit: LayerEdit, n_of_layer: int
) -> None:
    """Beside them, each control adds one: the strengths of the tokens with logits, for the last layer."""
    some = [Row(token, position, output=position > 30) for position, token in enumerate(TOKENS)]

    def n_nodes() -> int:
        counts = []
        for batch in (rows(TOKENS), some):
            before = llama.n_nodes
            llama.logits(batch)
            counts.append(llama.n_nodes - before)
        assert counts[0] == counts[1]
        return counts[0]

    unsteered = n_nodes()
    assert unsteered > 10 * N_LAYER

    llama.set_edits({1: edit})
    assert n_nodes() == unsteered + n_of_layer + 1
    llama.set_controls([{1: edit}, {1: edit}])
    assert n_nodes() == unsteered + 2 * (n_of_layer + 1)
    llama.set_edits(dict.fromkeys(LAYERS, edit))
    for strength, first in ((1.0, 0), (0.5, 0), (0.5, len(TOKENS) - 1)):
        llama.set_strength(strength, first=first)
        assert n_nodes() == unsteered + N_LAYER * n_of_layer + 1
    llama.set_strength(0.0)
    assert n_nodes() == unsteered


def test_a_change_of_strength_neither_rebuilds_nor_reserves_a_graph(llama: Context) -> None:
    llama.set_edits(ALL)
    llama.logits(rows(TOKENS[:10]))
    llama.decode(rows(TOKENS[10:11], start=10))
    reused = llama.n_reused()

    with log_lines() as lines:
        for position, strength in enumerate((0.9, 0.5, 0.25, 1.0, 2.0), start=11):
            llama.set_strength(strength, first=position)
            llama.decode(rows(TOKENS[position : position + 1], start=position))

    assert llama.n_reused() - reused == 5
    assert not [line for line in lines if "reserv" in line]


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize(("file_type", "n_embd"), [("Q8_0", 64), ("Q4_0", 64), ("Q4_K_M", 256)])
def test_quantized_models_run_steered(child: ProcessPoolExecutor, file_type: str, n_embd: int) -> None:
    random: Callable[..., NDArray[np.float64]] = np.random.default_rng(1).standard_normal
    gguf = quantized(tiny_model("llama", n_layer=N_LAYER, n_embd=n_embd).gguf, file_type)
    edits = {layer: LayerEdit(remove=random((3, n_embd)), add=0.3 * random(n_embd)) for layer in LAYERS}

    assert child.submit(steered_difference, gguf, edits, TOKENS).result() > 0.1


def test_edit_of_another_width_is_refused_before_llama_cpp_reads_it(llama: Context) -> None:
    llama.set_edits(ALL)
    former = llama.logits(rows(TOKENS))
    for edit in (LayerEdit(remove=np.ones(N_EMBD + 1)), LayerEdit(add=np.ones(N_EMBD - 1))):
        with pytest.raises(SteeringError, match="has width"):
            llama.set_edits({1: edit})
    assert same_bits(llama.logits(rows(TOKENS)), former)
