"""Quantization of a whole model file by llama.cpp, as its llama-quantize does."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import llama_cpp.llama_cpp as llama

from alignez_gguf.errors import ModelFileError
from alignez_gguf.runtime.library import captured_log

LEVELS = {
    "F16": llama.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_1": llama.LLAMA_FTYPE_MOSTLY_Q5_1,
    "Q5_K_M": llama.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q5_0": llama.LLAMA_FTYPE_MOSTLY_Q5_0,
    "Q4_1": llama.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_K_M": llama.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_XS": llama.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "Q3_K_M": llama.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q2_K": llama.LLAMA_FTYPE_MOSTLY_Q2_K,
}
"""Levels that need no importance matrix, the finest first."""

SUPER_BLOCK = 256
"""Rows of the K and IQ types must be multiples of it; llama.cpp silently takes another type otherwise."""


def needs_super_blocks(level: str) -> bool:
    """Whether a level keeps weights in blocks of 256."""
    return "_K" in level or level.startswith("IQ")


def quantize_file(source: Path, target: Path, level: str, *, n_threads: int = 1) -> None:
    """Write `source` at one of `LEVELS` to `target`; a source that is quantized already is quantized again.

    Raises:
        ModelFileError: llama.cpp cannot do so; nothing is left behind.
    """
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread = n_threads
    parameters.ftype = LEVELS[level]
    parameters.allow_requantize = True
    with captured_log() as log:
        status = llama.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
        )
    if status != 0:
        target.unlink(missing_ok=True)
        raise ModelFileError(
            f"llama.cpp cannot quantize {source} to {level}: {log.reason()}; leave that level out"
        )
