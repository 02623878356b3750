"""A matrix as a sum of quantized ones, whose product rounds the vector as the model's own product does.

llama.cpp on a CPU multiplies a quantized matrix with a vector that it first rounds to 8 bits, in the way that
belongs to the type of the matrix (`vec_dot_type` in ggml/src/ggml-cpu/ggml-cpu.c); one in F32 meets the
vector as it is. The A = V W of a LoRA in F32 would therefore take away something else than what the rounded
product with W put there. In a type that rounds as the type of W does, it takes away the same; what its own
rounding loses is a matrix again, in the rows below, and what that one loses in the rows below those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.runtime.quantize import quantize

_N_TERMS = 4
"""What four lose is below a float32's own rounding: 3e-10 of the largest number in Q8_0, 6e-8 in Q6_K."""
_STEP = 2.0**-6
"""Each term is as much smaller than the one before it. Powers of two lose nothing."""
_CARRIERS = {
    "Q8_0": ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4"),
    "Q6_K": (
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
    ),
}
"""The finest type of those that round a vector to Q8_0, and to Q8_K, and the types that do.

Q4_1 and Q5_1 are in neither list: they round a vector's sum too, and none of their kind is fine enough.
"""


@dataclass(frozen=True, eq=False)
class Stack:
    """A matrix M as sum_j scales[j] M_j.

    Attributes:
        kind: the `gguf.GGMLQuantizationType` of every M_j.
        rows: M_0 above M_1 and so on, in bytes [.., n_terms * k, bytes of a row].
        scales: [n_terms], powers of two that fall by `_STEP`.
    """

    kind: Any
    rows: NDArray[np.uint8]
    scales: NDArray[np.float32]


def carrier(kind: Any) -> Any:
    """The type to stack, which rounds a vector as `kind` does; `None` if there is none."""
    import gguf

    for name, kinds in _CARRIERS.items():
        if kind.name in kinds:
            return gguf.GGMLQuantizationType[name]
    return None


def stack(matrix: NDArray[np.float64], kind: Any) -> Stack:
    """A matrix [.., k, n], or several, as stacks of terms of `kind`; n is a multiple of its block size."""
    import gguf

    largest = np.abs(matrix).max()
    scale = 2.0 ** np.ceil(np.log2(largest)) if largest else 1.0
    rest = matrix.reshape(-1, matrix.shape[-1])
    terms, scales = [], []
    for _ in range(_N_TERMS):
        rows = quantize((rest / scale).astype(np.float32), kind)
        if rows is None:
            raise ValueError(f"rows of {matrix.shape[-1]} cannot be stored as {kind.name}")
        rest = rest - scale * gguf.dequantize(rows, kind).astype(np.float64)
        terms.append(rows.reshape(*matrix.shape[:-1], -1))
        scales.append(scale)
        scale *= _STEP
    return Stack(kind, np.concatenate(terms, axis=-2), np.array(scales, np.float32))
