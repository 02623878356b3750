"""Quantization by ggml itself, which knows more types than the gguf package can write."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.runtime import library


def quantize(values: NDArray[np.float32], kind: Any) -> NDArray[np.uint8] | None:
    """Rows of numbers [n_rows, n] as rows of bytes of a type.

    Args:
        values: contiguous; n has to be a multiple of the block size of the type.
        kind: a `gguf.GGMLQuantizationType`.

    Returns:
        `None` where ggml cannot do so without an importance matrix, or not at all.

    Raises:
        RuntimeUnavailableError: there is no llama.cpp.
    """
    import gguf

    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_rows, n = values.shape
    ggml = library.ggml_base()
    if n % block or ggml.ggml_quantize_requires_imatrix(int(kind)):
        return None
    if kind.name in ("F32", "F16", "BF16"):
        return np.asarray(gguf.quantize(values, kind)).view(np.uint8).reshape(n_rows, -1)
    if kind.name not in _TYPES:
        return None
    rows = np.empty((n_rows, n // block * n_bytes), np.uint8)
    source = np.ascontiguousarray(values, np.float32)
    ggml.ggml_quantize_chunk(int(kind), source.ctypes.data, rows.ctypes.data, 0, n_rows, n, None)
    return rows


_TYPES = frozenset(
    {
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0"),
    }
)
"""Which ggml_quantize_chunk of ggml/src/ggml.c takes without an importance matrix; it aborts on others."""
