"""Quantized products on a CPU with AMX, whose tiles each library of a process configures for itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch

from alignez_gguf.runtime.quantize import quantize_file
from tests.models import tiny_model

pytestmark = pytest.mark.skipif(
    b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info(), reason="this llama.cpp uses no AMX"
)

N_TOKENS = 48
"""Of one piece: more than the 32 rows of two tiles."""

# A process of its own, since what it guards against is an illegal instruction.
CHILD = f"""
import sys
import numpy as np, torch
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model

tokens = list(range(3, 3 + {N_TOKENS}))
with Model(sys.argv[1], n_gpu_layers=0) as model:
    with Context(model, n_ctx=256, n_sequences=1, n_batch={N_TOKENS}) as context:
        def logits():
            context.clear()
            context.decode(tokens, range(len(tokens)), [0] * len(tokens), [True] * len(tokens))
            return np.stack([context.logits(index) for index in range(len(tokens))])

        before = logits()
        x = torch.ones(256, 256, dtype=torch.bfloat16)
        assert float((x @ x).sum()) == 256**3
        assert np.array_equal(logits(), before)
np.save(sys.argv[2], before)
"""


@pytest.mark.parametrize("level", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_tiles_of_another_library_change_nothing(tmp_path: Path, level: str) -> None:
    tiny = tiny_model("llama", n_embd=256)
    model, found = tmp_path / "model.gguf", tmp_path / "logits.npy"
    quantize_file(tiny.gguf, model, level)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(found)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    with torch.no_grad():
        expected = tiny.hf(torch.arange(3, 3 + N_TOKENS)[None]).logits[0].numpy()
    logits = np.load(found)
    error = np.linalg.norm(logits[:, : expected.shape[1]] - expected) / np.linalg.norm(expected)
    assert error < (0.1 if level == "Q8_0" else 0.6)  # 1.4 if they had nothing in common
