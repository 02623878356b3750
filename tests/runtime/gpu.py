"""The GPU that the tests of the patch run on, if the environment says so; tools/benchmarks/bench_cuda.sh
does."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

LAYERS = int(os.environ.get("ALIGNEZ_TEST_GPU_LAYERS", "0"))
"""How many layers a GPU holds; -1 for all."""

TF32 = 0.03
"""How far TF32 may move a logit of the tiny models. CUDA computes F32 products of 3 to 16 rows in it, and
those with experts, steered or not (ggml_cuda_should_use_mmf in ggml/src/ggml-cuda/mmf.cu); others are exact
where NVIDIA_TF32_OVERRIDE is 0."""


def tolerance(exact: float) -> float:
    """`exact`, or what TF32 leaves of it on a GPU."""
    return max(exact, TF32) if LAYERS else exact


def same_bits(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Whether two runs gave the same bits. On a GPU, whether they differ by no more than TF32 explains.

    On an H200 about one such comparison in a hundred was off by as much, another one every time, also where
    no token was steered. Nobody knows why.
    """
    if LAYERS:
        return one.shape == other.shape and float(np.abs(one - other).max()) < TF32
    return np.array_equal(one, other)
