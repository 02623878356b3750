"""Stacks of quantized terms: what they sum to, and that ggml multiplies them as it does the weight."""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from alignez_gguf.errors import SteeringError
from alignez_gguf.exporters.stacked import Stack, carrier, minima, stack

random = np.random.default_rng(0).standard_normal
SIZES = np.array([1.0, 1e-3, 20.0])[:, None]
"""Rows of one matrix that differ in size."""

QUANTIZED = (
    *(Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.MXFP4),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.TQ1_0, Type.TQ2_0),
    *(Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS),
)
"""The types of weights that can be stacked."""


def summed(stacked: Stack, n_rows: int) -> NDArray[np.float64]:
    terms = gguf.dequantize(stacked.rows, stacked.kind).astype(np.float64)
    terms = terms.reshape(*stacked.rows.shape[:-2], len(stacked.scales), n_rows, -1)
    total: NDArray[np.float64] = np.einsum("...jkn,j->...kn", terms, stacked.scales)
    return total


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q6_K, Type.Q5_1, Type.BF16])
@pytest.mark.parametrize("size", [1e-6, 0.02, 50.0])
@pytest.mark.parametrize("shape", [(3, 512), (4, 3, 256)])
def test_a_stack_sums_to_its_matrix_as_float32_would(kind: Any, size: float, shape: tuple[int, ...]) -> None:
    matrix = size * SIZES * random(shape)

    total = summed(stack(matrix, kind), 3)

    assert np.abs(total - matrix).max() < 2.0**-23 * np.abs(matrix).max()


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not summed(stack(np.zeros((2, 256)), Type.Q6_K), 2).any()


def test_scales_lose_nothing_when_they_multiply() -> None:
    scales = stack(random((2, 256)), Type.Q8_0).scales
    assert np.array_equal(np.log2(scales), np.round(np.log2(scales)))


def test_the_minima_of_a_stack_have_the_given_total() -> None:
    """By the bytes of `block_q5_1`: d, m, 32 fifth bits, and 32 times four bits."""
    m = 3.0 * random((2, 8))

    stacked = stack(random((2, 256)), Type.Q5_1, m)

    blocks = stacked.rows.reshape(len(stacked.scales), 2, 8, 24)
    held = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float64)
    assert np.abs(np.einsum("jkn,j->kn", held, stacked.scales) - m).max() < 2.0**-11 * np.abs(m).max()


def test_minima_that_are_added_leave_the_numbers_as_they_are() -> None:
    matrix = random((3, 512))

    total = summed(stack(matrix, Type.Q5_1, 50.0 * random((3, 16))), 3)

    assert np.abs(total - matrix).max() < 2.0**-23 * np.abs(matrix).max()


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q5_1])
def test_the_minima_of_a_weight_are_those_of_its_numbers(kind: Any) -> None:
    """The smallest number of a block is its m, as gguf reads it: q is 0 there."""
    rows = gguf.quantize(random((4, 96)).astype(np.float32), kind)
    smallest = gguf.dequantize(rows, kind).reshape(4, 3, 32).min(axis=2)

    found = minima(rows, kind)

    assert found is not None
    np.testing.assert_allclose(found, smallest, atol=1e-6)


def test_a_stack_is_multiplied_as_the_weight_is() -> None:
    carried = {kind: carrier(kind) for kind in QUANTIZED}

    assert {Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q6_K} <= set(carried)
    for kind, stored in carried.items():
        assert rounding_of_vectors(kind) == rounding_of_vectors(stored)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16])
def test_types_that_an_a_in_float32_meets_are_not_stacked(kind: Any) -> None:
    assert carrier(kind) is None


@pytest.mark.parametrize("kind", [Type.NVFP4, Type.Q8_1])
def test_types_that_no_lora_meets_are_refused_with_the_mend(kind: Any) -> None:
    with pytest.raises(SteeringError, match=f"stored as {kind.name}.*--format merged.*runtime build"):
        carrier(kind)


class Traits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def rounding_of_vectors(kind: Any) -> int:
    """The type to which ggml on a CPU rounds a vector before it is multiplied with a matrix of `kind`."""
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml_base_path

    try:
        ggml = load_shared_library("ggml-cpu", libggml_base_path)
    except FileNotFoundError:
        pytest.skip("the CPU backend of this build has a name of its own")
    ggml.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    return int(ggml.ggml_get_type_traits_cpu(int(kind)).contents.vec_dot_type)
