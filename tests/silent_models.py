"""Tiny GGUF files of models that do not write text token by token; nothing may run them as if they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from alignez_gguf import demo

_N_EMBD, _N_FF, _N_LAYER, _N_HEAD = 64, 128, 2, 4


def write_t5(path: Path) -> Path:
    """An encoder-decoder model with random weights, and the tokenizer of the demo model."""
    writer, n_vocab = _writer(path, "t5")
    for key, value in {
        "attention.key_length": _N_EMBD // _N_HEAD,
        "attention.value_length": _N_EMBD // _N_HEAD,
        "attention.relative_buckets_count": 32,
        "decoder_start_token_id": 0,
    }.items():
        writer.add_uint32(f"t5.{key}", value)
    writer.add_float32("t5.attention.layer_norm_rms_epsilon", 1e-6)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (n_vocab, _N_EMBD), "output": (n_vocab, _N_EMBD)}
    for side, kinds in {"enc": ("attn",), "dec": ("attn", "cross_attn")}.items():
        shapes[f"{side}.output_norm"] = (_N_EMBD,)
        for layer in range(_N_LAYER):
            block = f"{side}.blk.{layer}"
            shapes[f"{block}.attn_rel_b"] = (32, _N_HEAD)
            shapes |= {f"{block}.{kind}_norm": (_N_EMBD,) for kind in (*kinds, "ffn")}
            shapes |= {f"{block}.{kind}_{part}": (_N_EMBD, _N_EMBD) for kind in kinds for part in "qkvo"}
            shapes |= {f"{block}.ffn_up": (_N_FF, _N_EMBD), f"{block}.ffn_down": (_N_EMBD, _N_FF)}
    _write(writer, {f"{name}.weight": shape for name, shape in shapes.items()})
    return path


def write_bert(path: Path) -> Path:
    """An embedding model with random weights, and the tokenizer of the demo model."""
    writer, n_vocab = _writer(path, "bert")
    writer.add_float32("bert.attention.layer_norm_epsilon", 1e-6)
    writer.add_bool("bert.attention.causal", False)
    writer.add_uint32("bert.pooling_type", gguf.PoolingType.MEAN)
    writer.add_uint32("tokenizer.ggml.token_type_count", 2)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, _N_EMBD),
        "token_types.weight": (2, _N_EMBD),
        "position_embd.weight": (128, _N_EMBD),
        "token_embd_norm.weight": (_N_EMBD,),
        "token_embd_norm.bias": (_N_EMBD,),
    }
    matrices = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (_N_EMBD, _N_EMBD))
    matrices |= {"ffn_up": (_N_FF, _N_EMBD), "ffn_down": (_N_EMBD, _N_FF)}
    for layer in range(_N_LAYER):
        for name, shape in matrices.items():
            shapes |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
        for norm in ("attn_output_norm", "layer_output_norm"):
            shapes |= {f"blk.{layer}.{norm}.{part}": (_N_EMBD,) for part in ("weight", "bias")}
    _write(writer, shapes)
    return path


def write_embedding_decoder(path: Path) -> Path:
    """The demo model, a decoder, marked as an embedding model with the pooling of its last token."""
    reader = gguf.GGUFReader(demo.MODEL)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    copy_fields(reader, writer)
    writer.add_uint32(f"{arch}.pooling_type", gguf.PoolingType.LAST)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return path


def _writer(path: Path, arch: str) -> tuple[Any, int]:
    """A file with what all architectures have, and the size of its vocabulary."""
    reader = gguf.GGUFReader(demo.MODEL)
    writer = gguf.GGUFWriter(path, arch)
    copy_fields(reader, writer, "tokenizer.")
    writer.add_context_length(128)
    writer.add_embedding_length(_N_EMBD)
    writer.add_feed_forward_length(_N_FF)
    writer.add_block_count(_N_LAYER)
    writer.add_head_count(_N_HEAD)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    return writer, len(reader.fields["tokenizer.ggml.tokens"].contents())


def copy_fields(reader: Any, writer: Any, prefix: str = "") -> None:
    """Copy the metadata whose keys begin with `prefix`, but for the architecture."""
    for name, field in reader.fields.items():
        if name.startswith(prefix) and not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)


def _write(writer: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    normal = np.random.default_rng(0).standard_normal
    for name, shape in shapes.items():
        around = 1.0 if "norm.weight" in name else 0.0
        writer.add_tensor(name, (around + 0.1 * normal(shape)).astype(np.float32))
    finish(writer)


def finish(writer: Any) -> None:
    """Write all that a `GGUFWriter` was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
