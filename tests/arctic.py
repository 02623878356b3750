"""A tiny random arctic, which transformers does not have: its GGUF, and what it computes in numpy.

Each layer has a dense MLP behind the attention and a mixture that reads the residual stream before the
attention (`llama_model_arctic::graph` in src/models/arctic.cpp of llama.cpp).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit
from tests.models import cached_file, tiny_model

N_LAYER, N_EMBD = 3, 64
_N_HEAD, _N_HEAD_KV, _HEAD = 4, 2, 16
_N_EXPERT, _N_USED, _N_FF = 4, 2, 64
_EPSILON, _ROPE_BASE = 1e-5, 10000.0

Array = NDArray[np.float64]


def arctic() -> Path:
    """The GGUF in F32, with the vocabulary of the other tiny models; written once."""
    return cached_file(f"arctic-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}", _write)


def arctic_logits(
    tokens: Sequence[int], edits: Mapping[int, LayerEdit], blocks: list[Array] | None = None
) -> Array:
    """Logits [n_tokens, n_vocab] with these edits; `blocks` takes the residual stream at the ends of blocks.

    The removal is one from the sum of both branches, which is what the layer's MLPs add to the stream.
    """
    weights = _weights()
    x = weights["token_embd"][list(tokens)]
    for layer in range(N_LAYER):
        w = {name.split(".", 2)[2]: a for name, a in weights.items() if name.startswith(f"blk.{layer}.")}
        after_attention = x + _attention(w, _norm(x, w["attn_norm"]))
        dense = _mlp(_norm(after_attention, w["ffn_norm"]), w["ffn_gate"], w["ffn_up"], w["ffn_down"])
        written = dense + _mixture(w, _norm(x, w["ffn_norm_exps"]))
        edit = edits.get(layer, LayerEdit())
        if edit.remove is not None:
            written = written - written @ edit.remove.T @ edit.remove
        x = after_attention + written
        if edit.add is not None:
            x = x + edit.add
        if blocks is not None:
            blocks.append(x)
    logits: Array = _norm(x, weights["output_norm"]) @ weights["output"].T
    return logits


def _norm(x: Array, weight: Array) -> Array:
    normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + _EPSILON) * weight
    return normed


def _mlp(x: Array, gate: Array, up: Array, down: Array) -> Array:
    gated = x @ gate.T
    written: Array = (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T
    return written


def _mixture(w: dict[str, Array], x: Array) -> Array:
    scores = np.exp(x @ w["ffn_gate_inp"].T)
    chosen = np.argsort(-scores, axis=-1)[:, :_N_USED]
    written = np.zeros_like(x)
    for token, experts in enumerate(chosen):
        for expert in experts:
            share = scores[token, expert] / scores[token, experts].sum()
            parts = (w[f"ffn_{part}_exps"][expert] for part in ("gate", "up", "down"))
            written[token] += share * _mlp(x[token], *parts)
    return written


def _attention(w: dict[str, Array], x: Array) -> Array:
    def heads(name: str, count: int) -> Array:
        return (x @ w[name].T).reshape(len(x), count, _HEAD).transpose(1, 0, 2)

    queries, keys = _rotated(heads("attn_q", _N_HEAD)), _rotated(heads("attn_k", _N_HEAD_KV))
    keys, values = (np.repeat(a, _N_HEAD // _N_HEAD_KV, 0) for a in (keys, heads("attn_v", _N_HEAD_KV)))
    scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(_HEAD)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = shares / shares.sum(-1, keepdims=True) @ values
    written: Array = mixed.transpose(1, 0, 2).reshape(len(x), -1) @ w["attn_output"].T
    return written


def _rotated(x: Array) -> Array:
    """RoPE of neighbouring pairs, [n_head, n_tokens, head]."""
    angles = np.arange(x.shape[1])[:, None] * _ROPE_BASE ** (-np.arange(0, _HEAD, 2) / _HEAD)
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


@cache
def _weights() -> dict[str, Array]:
    """As float32 holds them, by the names of the GGUF without `.weight`."""
    random = np.random.default_rng(0)
    n_kv, n_vocab = _N_HEAD_KV * _HEAD, len(_vocabulary()["tokenizer.ggml.tokens"][0])
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (n_vocab, N_EMBD), "output": (n_vocab, N_EMBD)}
    norms = ["output_norm"]
    for layer in range(N_LAYER):
        block = f"blk.{layer}."
        norms += [block + name for name in ("attn_norm", "ffn_norm", "ffn_norm_exps")]
        shapes |= {f"{block}attn_{name}": (N_EMBD, N_EMBD) for name in ("q", "output")}
        shapes |= {f"{block}attn_{name}": (n_kv, N_EMBD) for name in ("k", "v")}
        shapes |= {f"{block}ffn_{name}": (N_EMBD, N_EMBD) for name in ("gate", "up", "down")}
        shapes |= {f"{block}ffn_{name}_exps": (_N_EXPERT, _N_FF, N_EMBD) for name in ("gate", "up")}
        shapes |= {f"{block}ffn_down_exps": (_N_EXPERT, N_EMBD, _N_FF)}
        shapes |= {f"{block}ffn_gate_inp": (_N_EXPERT, N_EMBD)}
    weights = {name: random.standard_normal(shape) * N_EMBD**-0.5 for name, shape in shapes.items()}
    weights |= {name: 1 + 0.1 * random.standard_normal(N_EMBD) for name in norms}
    return {name: array.astype(np.float32).astype(np.float64) for name, array in weights.items()}


@cache
def _vocabulary() -> dict[str, tuple[Any, Any]]:
    """Metadata with its types, from a model that has been converted."""
    fields = gguf.GGUFReader(tiny_model("llama").gguf).fields
    return {name: (f.contents(), f.types) for name, f in fields.items() if name.startswith("tokenizer.")}


def _write(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "arctic")
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(_N_HEAD)
    writer.add_head_count_kv(_N_HEAD_KV)
    writer.add_layer_norm_rms_eps(_EPSILON)
    writer.add_rope_dimension_count(_HEAD)
    writer.add_rope_freq_base(_ROPE_BASE)
    writer.add_expert_count(_N_EXPERT)
    writer.add_expert_used_count(_N_USED)
    for name, (value, types) in _vocabulary().items():
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, array in _weights().items():
        writer.add_tensor(f"{name}.weight", array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
