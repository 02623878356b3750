"""Quantization by llama.cpp: of rows, for which ggml knows more types than the gguf package, and of files."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.errors import ModelFileError
from alignez_gguf.runtime import bindings

LEVELS = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K_M", "Q5_0"),
    *("Q4_1", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"),
)
"""Levels of a file that need no importance matrix, the finest first."""

SUPER_BLOCK = 256
"""Rows of the K and IQ types must be multiples of it; llama.cpp silently takes another type otherwise."""


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
    ggml = bindings.ggml_base()
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


def needs_super_blocks(level: str) -> bool:
    """Whether a level keeps weights in blocks of 256."""
    return "_K" in level or level.startswith("IQ")


def quantize_file(source: Path, target: Path, level: str, *, n_threads: int = 1) -> None:
    """Write `source` at one of `LEVELS` to `target`; a source that is quantized already is quantized again.

    Raises:
        ModelFileError: llama.cpp cannot do so; nothing is left behind.
    """
    import llama_cpp.llama_cpp as llama

    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread = n_threads
    parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{level}")
    parameters.allow_requantize = True
    with bindings.captured_log() as log:
        status = llama.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
        )
    if status != 0:
        target.unlink(missing_ok=True)
        raise ModelFileError(
            f"llama.cpp cannot quantize {source} to {level}: {log.reason()}; leave that level out"
        )
