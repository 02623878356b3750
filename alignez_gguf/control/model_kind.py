"""Checks by the metadata of a GGUF model, before it is loaded, whether it writes text token by token.

llama.cpp asserts, which ends the process, where an encoder-decoder or a draft model is decoded like a
language model, and it decodes an embedding model without a word. Names of architectures: LLM_ARCH_NAMES in
llama-arch.cpp. Knows nothing of llama.cpp's library, so that it costs no load.
"""

from __future__ import annotations

from collections.abc import Mapping

from alignez_gguf.errors import ModelFileError

# llama_model_has_encoder and llama_model::create_memory in llama-model.cpp, models/*.cpp: the encoders, the
# models that keep no KV cache, and those whose attention is never causal.
_ENCODER_DECODERS = {"t5"}
_EMBEDDERS = {
    "bert",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "llama-embed",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "t5encoder",
}
_DRAFTS = {"dflash", "eagle3", "gemma4-assistant"}
_DIFFUSERS = {"dream", "llada", "llada-moe", "rnd1"}
_SPEAKERS = {"pockettts", "qwen3tts", "wavtokenizer-dec"}

_POOLING_NONE = {None, 0, "0", 2**32 - 1, str(2**32 - 1)}
"""LLAMA_POOLING_TYPE_NONE and, as an unsigned number, LLAMA_POOLING_TYPE_UNSPECIFIED of llama.h."""


def require_text_model(arch: str, metadata: Mapping[str, object], source: str) -> None:
    """Refuse a model that does not write text token by token with causal attention.

    Args:
        arch: `general.architecture`.
        metadata: as a GGUF file has it, or as text, as llama.cpp hands it out.
        source: names the model in the error.

    Raises:
        ModelFileError: it is an encoder-decoder, embedding, reranking, draft, diffusion or speech model.
    """
    reason = _not_alone(arch) or _not_text(arch, metadata)
    if reason:
        raise ModelFileError(f"{source} is {reason}; give a language model that writes text token by token")


def require_embedder(arch: str, source: str) -> None:
    """Refuse a model that llama.cpp cannot embed texts with.

    Raises:
        ModelFileError: it is an encoder-decoder or a draft model.
    """
    reason = _not_alone(arch)
    if reason:
        raise ModelFileError(f"{source} is {reason}; give an embedding model")


def _not_alone(arch: str) -> str:
    if arch in _ENCODER_DECODERS:
        return f"an encoder-decoder model ({arch}), which cannot be run here"
    if arch in _DRAFTS:
        return f"a draft model ({arch}), which only runs beside another model"
    return ""


def _not_text(arch: str, metadata: Mapping[str, object]) -> str:
    if arch in _EMBEDDERS:
        return f"an embedding model ({arch}), which writes no text"
    if arch in _DIFFUSERS:
        return f"a diffusion model ({arch}), which does not write token by token"
    if arch in _SPEAKERS:
        return f"a speech model ({arch}), which writes no text"
    if metadata.get(f"{arch}.attention.causal") in (False, "false"):
        return f"an embedding model ({arch}.attention.causal is false), which writes no text"
    pooling = metadata.get(f"{arch}.pooling_type")
    if pooling not in _POOLING_NONE:
        return f"an embedding or reranking model ({arch}.pooling_type is {pooling}), which writes no text"
    return ""
