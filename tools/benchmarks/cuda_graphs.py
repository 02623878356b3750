"""Does steering leave CUDA graphs on? Decodes steered tokens and reads what ggml says of its graphs.

    PYTHONPATH=tools .venv/bin/python -m benchmarks.cuda_graphs MODEL.gguf

ggml captures the kernels of a token once, and launches the capture for the tokens after it as long as the
graph stays the same; where it cannot, every kernel is launched by itself. It says so in its log, at the level
of debugging (ggml_backend_cuda_graph_compute in ggml/src/ggml-cuda/ggml-cuda.cu).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.bed import decode
from benchmarks.forms import ChangingStrength, Form, NoEdit, Patch, removal

if TYPE_CHECKING:
    from alignez_gguf.runtime.context import Context

_WARM_UP = 8
_COUNTED = 32
_REUSED = "CUDA Graph id"
_LOST = ("CUDA graph warmup reset", "disabling CUDA graphs", "CUDA graph update failed")


def main(path: str) -> int:
    """Print what was found for each form; return 1 if steered tokens use fewer graphs than others."""
    from alignez_gguf.runtime.context import Context
    from alignez_gguf.runtime.model import Model

    with Model(path) as model, Context(model, n_ctx=_WARM_UP + _COUNTED) as context:
        rank_1, rank_4 = removal(model.info, 1), removal(model.info, 4)
        unsteered = _graphs("unsteered", context, NoEdit())
        steered = [
            _graphs("rank 1", context, Patch(context, rank_1)),
            _graphs("rank 4", context, Patch(context, rank_4)),
            _graphs("a new strength for every token", context, ChangingStrength(context, rank_1)),
        ]
    if unsteered <= 0:
        print("CUDA graphs are off, steered or not: no GPU holds the model, or it is too old for them")
        return 1
    return 0 if min(steered) >= unsteered else 1


def _graphs(name: str, context: Context, form: Form) -> int:
    """How many captured graphs were used again while tokens were decoded, less those that were lost."""
    with form:
        context.clear()
        for position in range(_WARM_UP):
            form.before_token()
            decode(context, position)
        with _log_lines() as lines:
            for position in range(_WARM_UP, _WARM_UP + _COUNTED):
                form.before_token()
                decode(context, position)
    n_reused = sum(_REUSED in line for line in lines)
    n_lost = sum(any(reason in line for reason in _LOST) for line in lines)
    print(f"{name}: in {_COUNTED} tokens {n_reused} captured graphs used again, {n_lost} lost")
    return n_reused - n_lost


@contextmanager
def _log_lines() -> Iterator[list[str]]:
    """Every line that llama.cpp and ggml log, at any level."""
    import llama_cpp

    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _, text, __: lines.append(text.decode("utf-8", "replace")))
    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(former, data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
