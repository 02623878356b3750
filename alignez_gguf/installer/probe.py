"""Does this llama.cpp compute with quantized weights on this CPU? A child process tries, and may die of it.

Tests on F32 models miss the builds that die: only quantized products reach the instructions that hypervisors
break (see `cpu`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignez_gguf.installer import probe_child

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300
_WINDOWS_EXCEPTION = 0xC0000000


@dataclass(frozen=True)
class ProbeResult:
    """The findings of the child process."""

    description: Mapping[str, Any]
    """As `probe_child.describe` gives it; empty where llama-cpp-python cannot be imported."""
    works: bool
    """The quantized products gave finite logits."""
    died: bool
    """The process was killed by the system: an illegal instruction or the like."""
    failure: str
    """Why it does not work, in one line; empty where it does."""


def run(site: Path | None = None) -> ProbeResult:
    """ProbeResult the llama-cpp-python in `site`, or the one that this interpreter would import."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        model = Path(temporary) / "probe.gguf"
        write_model(model)
        path = ["" if site is None else str(site), str(_ROOT), os.environ.get("PYTHONPATH", "")]
        try:
            child = subprocess.run(
                [sys.executable, "-m", probe_child.__name__, str(model)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return ProbeResult({}, works=False, died=False, failure=f"no answer within {_TIMEOUT_S} s")
    return interpret(child.returncode, child.stdout, child.stderr)


def interpret(returncode: int, stdout: str, stderr: str) -> ProbeResult:
    """Interpret the exit status and the output of the child process."""
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    description = lines[0] if lines else {}
    finite = len(lines) > 1 and lines[1]["finite"]
    # by the system: an illegal instruction, an assert or the like
    died = returncode < 0 or returncode >= _WINDOWS_EXCEPTION
    if returncode == 0 and finite:
        failure = ""
    elif returncode == 0:
        failure = "a quantized matrix product gives no finite numbers"
    elif died:
        failure = f"a quantized matrix product dies with {_signal_name(returncode)}"
    else:
        failure = (stderr.strip().splitlines() or [f"exit status {returncode}"])[-1]
    return ProbeResult(description, works=not failure, died=died, failure=failure)


def _signal_name(returncode: int) -> str:
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"status {returncode:#x}"


def write_model(path: Path) -> None:
    """Write a one-layer Llama without a vocabulary and with random Q4_0, Q8_0 and Q4_K weights, 0.8 MB."""
    import gguf
    from gguf import GGMLQuantizationType as Type

    n_embd, n_ff, n_head = 256, 512, 4
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(probe_child.N_VOCAB)
    writer.add_tokenizer_model("none")
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
    for name, n_out, n_in, kind in (
        ("token_embd", probe_child.N_VOCAB, n_embd, Type.Q8_0),
        ("output", probe_child.N_VOCAB, n_embd, Type.Q4_0),
        ("blk.0.attn_q", n_embd, n_embd, Type.Q8_0),
        ("blk.0.attn_k", n_embd, n_embd, Type.Q8_0),
        ("blk.0.attn_v", n_embd, n_embd, Type.Q8_0),
        ("blk.0.attn_output", n_embd, n_embd, Type.Q4_0),
        ("blk.0.ffn_gate", n_ff, n_embd, Type.Q4_K),
        ("blk.0.ffn_up", n_ff, n_embd, Type.Q4_K),
        ("blk.0.ffn_down", n_embd, n_ff, Type.Q4_K),
    ):
        data = (
            _random_q4_k(rng, n_out, n_in)
            if kind is Type.Q4_K
            else gguf.quantize(rng.normal(0, 0.1, (n_out, n_in)).astype(np.float32), kind)
        )
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_q4_k(rng: np.random.Generator, n_out: int, n_in: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random Q4_K blocks (256 weights in 144 bytes: scale, minimum, rest), which gguf cannot quantize to."""
    blocks = rng.integers(0, 256, (n_out, n_in // 256, 144), dtype=np.uint8)
    blocks[..., :4] = np.array([3e-4, 2e-3], np.float16).view(np.uint8)
    return blocks.reshape(n_out, -1)
