"""A model of the shape that the corpus is for: random weights in F32, no tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from fuzz.corpus import ARCHITECTURE, N_EMBD, N_LAYER

_N_FF, _N_HEAD, _N_VOCAB, _N_CTX = 2 * N_EMBD, 4, 32, 256


def tiny_model(folder: Path) -> Path:
    """Write the model into `folder`; the same bytes every time."""
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_context_length(_N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(_N_FF)
    writer.add_block_count(N_LAYER)
    writer.add_head_count(_N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def put(name: str, *shape: int) -> None:
        scale = shape[-1] ** -0.5
        writer.add_tensor(f"{name}.weight", scale * rng.standard_normal(shape, dtype=np.float32))

    put("token_embd", _N_VOCAB, N_EMBD)
    put("output", _N_VOCAB, N_EMBD)
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", np.ones(N_EMBD, np.float32))
        for projection in ("attn_q", "attn_k", "attn_v", "attn_output"):
            put(f"{block}.{projection}", N_EMBD, N_EMBD)
        for projection in ("ffn_gate", "ffn_up"):
            put(f"{block}.{projection}", _N_FF, N_EMBD)
        put(f"{block}.ffn_down", N_EMBD, _N_FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
