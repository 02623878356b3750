"""Run in a child process by `probe`: says which llama.cpp this is, then computes with a quantized model.

A broken build dies here and not in the caller. Prints two lines of JSON; the second is missing if it died.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from alignez_gguf.installer.source import recorded_patches
from alignez_gguf.runtime.bindings import declared, patch_version

N_VOCAB = 320
N_PROMPT = 48
"""Prompt tokens. The tiled kernels (AMX, repacked weights) want a batch of 32 and more."""
N_SINGLE = 4
"""Tokens decoded one by one, which takes the matrix-vector kernels."""


def describe() -> dict[str, Any]:
    """Describe the loaded llama-cpp-python, as JSON can hold it."""
    import llama_cpp
    from llama_cpp import llama_cpp as bindings

    return {
        "version": llama_cpp.__version__,
        "location": str(Path(llama_cpp.__file__).parent),
        "library": bindings._lib._name,
        "patch_version": patch_version(bindings._lib),
        "patches": recorded_patches(Path(llama_cpp.__file__).parents[1]),
        "devices": _devices(bindings._lib),
        "system_info": bindings.llama_print_system_info().decode(errors="replace").strip(),
    }


def _devices(library: Any) -> list[dict[str, str]]:
    """ggml's device registry; empty where libllama does not pass on ggml's symbols (Windows)."""
    if not hasattr(library, "ggml_backend_dev_count"):
        return []
    count = declared(library.ggml_backend_dev_count, ctypes.c_size_t)()
    device = declared(library.ggml_backend_dev_get, ctypes.c_void_p, ctypes.c_size_t)
    texts = {
        key: declared(function, ctypes.c_char_p, ctypes.c_void_p)
        for key, function in (
            ("name", library.ggml_backend_dev_name),
            ("description", library.ggml_backend_dev_description),
        )
    }
    return [
        {key: text(device(index)).decode(errors="replace") for key, text in texts.items()}
        for index in range(count)
    ]


def logits_are_finite(model_path: str) -> bool:
    """Decode a prompt in one batch, then single tokens, on the CPU with a quantized model.

    Raises:
        RuntimeError: llama.cpp cannot load or decode it.
    """
    from llama_cpp import llama_cpp as bindings

    bindings.llama_backend_init()
    model_params = bindings.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = bindings.llama_model_load_from_file(os.fsencode(model_path), model_params)
    if model is None:
        raise RuntimeError("llama.cpp cannot load the probe's model")
    params = bindings.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 2
    params.op_offload = False
    context = bindings.llama_init_from_model(model, params)
    if context is None:
        raise RuntimeError("llama.cpp cannot make a context for the probe's model")
    finite = True
    for n_tokens in (N_PROMPT, *[1] * N_SINGLE):
        tokens = (bindings.llama_token * n_tokens)(*range(n_tokens))
        status = bindings.llama_decode(context, bindings.llama_batch_get_one(tokens, n_tokens))
        if status != 0:
            raise RuntimeError(f"llama_decode of {n_tokens} tokens gave {status}")
        logits = np.ctypeslib.as_array(bindings.llama_get_logits_ith(context, -1), shape=(N_VOCAB,))
        finite = finite and bool(np.isfinite(logits).all()) and float(np.ptp(logits)) > 0
    bindings.llama_free(context)
    bindings.llama_model_free(model)
    return finite


if __name__ == "__main__":
    print(json.dumps(describe()), flush=True)
    print(json.dumps({"finite": logits_are_finite(sys.argv[1])}), flush=True)
