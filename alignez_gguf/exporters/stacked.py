"""A matrix as a sum of quantized ones, whose product rounds the vector as the model's own product does.

llama.cpp on a CPU multiplies a quantized matrix with a vector that it first rounds to 8 bits, in the way that
belongs to the type of the matrix (`vec_dot_type` in ggml/src/ggml-cpu/ggml-cpu.c); one in F32 meets the
vector as it is. The A = V W of a LoRA in F32 would therefore take away something else than what the rounded
product with W put there. In a type that rounds as the type of W does, it takes away the same; what its own
rounding loses is a matrix again, in the rows below, and what that one loses in the rows below those.

Q4_1 and Q5_1 keep a block as d q + m, and their product takes m times the sum of the block, which is rounded
on its own (`ggml_vec_dot_q4_1_q8_1` in ggml/src/ggml-cpu/quants.c). Their stack has the same numbers, and the
same m in total.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.errors import SteeringError
from alignez_gguf.runtime.quantize import quantize

_N_TERMS = {"Q8_0": 4, "Q6_K": 4, "Q5_1": 5, "BF16": 3}
"""The number of terms whose error is below a float32's own rounding: 3e-10 of the largest number in Q8_0,
6e-8 in Q6_K, 4e-8 in Q5_1, 7e-9 in BF16."""
_STEP = 2.0**-6
"""The ratio of each term to the one before it. Powers of two lose nothing."""
_CARRIERS = {
    "Q8_0": ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4"),
    "Q6_K": (
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
    ),
    "Q5_1": ("Q4_1", "Q5_1"),
    "BF16": ("BF16",),
}
"""By the type that is stacked, the types that round a vector as it does: to Q8_0, Q8_K, Q8_1 and BF16."""
_EXACT = ("F32", "F16")
"""Types that an A in F32 meets."""


@dataclass(frozen=True, eq=False)
class Stack:
    """A matrix M as sum_j scales[j] M_j.

    Attributes:
        kind: the `gguf.GGMLQuantizationType` of every M_j.
        rows: M_0 above M_1 and so on, in bytes [.., n_terms * k, bytes of a row].
        scales: [n_terms], powers of two, the first one by far the largest.
    """

    kind: Any
    rows: NDArray[np.uint8]
    scales: NDArray[np.float32]


def carrier(kind: Any) -> Any:
    """The type to stack, which rounds a vector as `kind` does; `None` for F32, which does as well.

    Raises:
        SteeringError: no LoRA rounds a vector as `kind` does.
    """
    import gguf

    for name, kinds in _CARRIERS.items():
        if kind.name in kinds:
            return gguf.GGMLQuantizationType[name]
    if kind.name in _EXACT:
        return None
    raise SteeringError(
        f"its weights are stored as {kind.name}, and no LoRA takes away what their product puts there; use "
        "another quantization, --format merged, or the patched runtime: alignez-gguf runtime build"
    )


def minima(rows: NDArray[np.uint8], kind: Any) -> NDArray[np.float32] | None:
    """The m of every block of rows of bytes [n, ..]: float32 [n, n_blocks]; `None` where there are none."""
    import gguf

    if kind.name not in _CARRIERS["Q5_1"]:
        return None
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.array(rows).reshape(len(rows), -1, n_bytes)
    # block_q4_1 and block_q5_1 of ggml/src/ggml-common.h: d, m, ..
    return np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)


def stack(matrix: NDArray[np.float64], kind: Any, total_minima: NDArray[np.float64] | None = None) -> Stack:
    """A matrix [.., k, n], or several, as stacks of terms of `kind`; n is a multiple of its block size.

    Args:
        matrix: the numbers.
        kind: of every term.
        total_minima: for Q5_1: sum_j scales[j] m_j of every block [.., k, n_blocks].
    """
    import gguf

    largest = np.abs(matrix).max()
    scale = first = 2.0 ** np.ceil(np.log2(largest)) if largest else 1.0
    rest = matrix.reshape(-1, matrix.shape[-1])
    missing = None if total_minima is None else total_minima.reshape(len(rest), -1)
    terms, scales = [], []
    for _ in range(_N_TERMS[kind.name]):
        rows = quantize((rest / scale).astype(np.float32), kind)
        if rows is None:
            raise ValueError(f"rows of {matrix.shape[-1]} cannot be stored as {kind.name}")
        rest = rest - scale * gguf.dequantize(rows, kind).astype(np.float64)
        m = minima(rows, kind)
        if missing is not None and m is not None:
            missing = missing - scale * m
        terms.append(rows.reshape(*matrix.shape[:-1], -1))
        scales.append(scale)
        scale *= _STEP
    if missing is not None:
        terms.append(_zeros(missing / (first * _STEP)).reshape(terms[0].shape))
        scales.append(first * _STEP)
    return Stack(kind, np.concatenate(terms, axis=-2), np.array(scales, np.float32))


def _zeros(m: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Rows of Q5_1 with these m [n, n_blocks] whose numbers are 0: d is -m / 16, and every q is 16."""
    blocks = np.zeros((*m.shape, 24), np.uint8)
    d = (-m / 16).astype(np.float16)
    blocks[..., 0:2] = d[..., None].view(np.uint8)
    blocks[..., 2:4] = (np.float16(-16) * d)[..., None].view(np.uint8)
    blocks[..., 4:8] = 0xFF  # the fifth bits
    return blocks.reshape(len(m), -1)
