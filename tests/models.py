"""Random tiny models for tests: the same weights as a PyTorch model and as a GGUF file.

The PyTorch model, with forward hooks, is the oracle of everything that we do inside llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from alignez_gguf.installer.source import source_tree
from tests import convert as converter

CACHE = Path(__file__).parents[1] / ".cache" / "test-models"

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2moe",
    "olmo2",
    "gemma3",
    "granite",
    "phi3",
    "deepseek2",
    "deepseek3",
    "lfm2",
)
"""Of which every layer can be edited. `deepseek2` and `deepseek3` (latent attention, a leading dense layer, a
shared expert) are one architecture to llama.cpp, and route otherwise; `lfm2` is a hybrid."""
EXPERTS_WITH_BIAS = "gpt-oss"
"""The patch reaches all of it. Adapters cannot add what a removal at layer 0 takes from the bias."""
OUT_OF_REACH = "apertus"
"""Its MLP is built outside llama.cpp's `build_ffn`, so the patch cannot remove anything there."""
RECURRENT = "mamba"
"""Its layers have no MLP: nothing to remove, and a place to add."""
NORMED_BRANCHES = "gemma4"
"""As the 26B-A4B: a dense MLP and a mixture, each with a norm of its own behind it, so that no tensor is the
MLP output that the patch could edit."""
LATENT_MIXTURE = "nemotron_h"
"""A hybrid whose layers are a Mamba 2, a mixture, an attention and a mixture; the routed experts of a mixture
work in a width of their own, 32."""

_VOCABULARY = 384
_SPECIAL = ("<s>", "</s>")
_TOKENIZER_TEXT = (
    "Question: how do I bake a cake?\nAnswer: make a plan, work slowly and mind the oven.\n"
    "Question: how do I pick a lock?\nAnswer: sorry, that is not something that I can help with.\n"
    "The quick brown fox jumps over the lazy dog while the other dogs sleep in the warm sun.\n"
)


@dataclass(frozen=True, eq=False)
class TinyModel:
    """One set of random weights, twice."""

    hf: PreTrainedModel
    """In float32 and evaluation mode."""
    gguf: Path
    """In F32."""
    mlp_modules: list[nn.Module | None]
    """The MLP (or sparse mixture) of each layer; a forward hook on it sees the MLP output. None where there
    is no MLP."""
    blocks: list[nn.Module]
    """The decoder layers; a forward hook on one sees the residual stream after the block."""


def tiny_model(architecture: str, **overrides: Any) -> TinyModel:
    """A random model of one of `ARCHITECTURES`, or the single ones named above.

    `seed` (default 0), `n_layer` (3, but always 4 of `LATENT_MIXTURE`), `n_embd` (64, a multiple of 64) and
    any field of the architecture's transformers config can be overridden. The GGUF is converted once and kept
    in `.cache/`, under a name that is a hash of the weights.
    """
    config = _config(architecture, **overrides)
    torch.manual_seed(overrides.get("seed", 0))
    hf: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    _randomise_vectors(hf)
    hf.requires_grad_(False)
    blocks = list(getattr(hf, hf.base_model_prefix).layers)
    return TinyModel(
        hf=hf,
        gguf=_converted(architecture, hf),
        mlp_modules=list(map(_mlp_of, blocks)),
        blocks=blocks,
    )


def quantized(gguf: Path, file_type: str) -> Path:
    """The same model as `Q8_0`, `Q4_0` or (n_embd a multiple of 256) `Q4_K_M`, kept in `.cache/`."""
    import llama_cpp

    def write(target: Path) -> None:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        parameters.nthread = 2
        status = llama_cpp.llama_model_quantize(str(gguf).encode(), str(target).encode(), parameters)
        if status:
            raise RuntimeError(f"cannot quantize {gguf} to {file_type}")

    return cached_file(f"{gguf.stem}-{file_type}", write)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level BPE that all tiny models share: any text, no unknown tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in _SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator([_TOKENIZER_TEXT] * 2, trainer)
    bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, bos_token=bos, eos_token=eos
    )


def _config(architecture: str, seed: int = 0, n_layer: int = 3, n_embd: int = 64, **fields: Any) -> Any:
    common = {
        "vocab_size": len(tokenizer()),
        "hidden_size": n_embd,
        "intermediate_size": 2 * n_embd,
        "num_hidden_layers": n_layer,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Wide enough for logits that differ, narrow enough to stay near unit scale.
        "initializer_range": n_embd**-0.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    experts = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
    deepseek = {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": n_embd,
        **experts,
    }
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("llama", {}),
        "mistral": ("mistral", {"sliding_window": None}),
        "qwen2": ("qwen2", {}),
        "qwen3": ("qwen3", {"head_dim": n_embd // 4}),
        "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None, **experts}),
        "qwen2moe": (
            "qwen2_moe",
            {
                "num_experts": 4,
                "moe_intermediate_size": n_embd,
                "shared_expert_intermediate_size": 2 * n_embd,
                **experts,
            },
        ),
        "olmo2": ("olmo2", {}),
        "gemma3": (
            "gemma3_text",
            {
                "head_dim": n_embd // 4,
                "query_pre_attn_scalar": n_embd // 4,
                "sliding_window": 16,
                "tie_word_embeddings": True,
            },
        ),
        "granite": (
            "granite",
            {
                "attention_multiplier": (n_embd // 4) ** -0.5,
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.5,
                "logits_scaling": 2.0,
            },
        ),
        "phi3": ("phi3", {"original_max_position_embeddings": 512}),
        EXPERTS_WITH_BIAS: (
            "gpt_oss",
            {
                "head_dim": n_embd // 4,
                "num_local_experts": 4,
                "sliding_window": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                **experts,
            },
        ),
        "deepseek2": ("deepseek_v2", deepseek),
        # What the converter takes from the files of released models, and transformers knows without.
        "deepseek3": ("deepseek_v3", {"scoring_func": "sigmoid", **deepseek}),
        "lfm2": (
            "lfm2",
            {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        ),
        LATENT_MIXTURE: (
            "nemotron_h",
            {
                "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
                "head_dim": n_embd // 4,
                "ssm_state_size": 16,
                "mamba_num_heads": 8,
                "mamba_head_dim": n_embd // 4,
                "n_groups": 2,
                "time_step_min": 1e-9,  # transformers clamps to it, llama.cpp does not
                "n_routed_experts": 4,
                "moe_intermediate_size": n_embd,
                "moe_shared_expert_intermediate_size": 2 * n_embd,
                "moe_latent_size": n_embd // 2,
                **experts,
            },
        ),
        NORMED_BRANCHES: (
            "gemma4_text",
            {
                "head_dim": n_embd // 4,
                "global_head_dim": n_embd // 2,  # the converter expects another one
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": n_embd,
                "tie_word_embeddings": True,
                "experts_implementation": "eager",
            },
        ),
        RECURRENT: ("mamba", {"state_size": 16}),
        OUT_OF_REACH: ("apertus", {}),
    }
    model_type, special = families[architecture]
    return AutoConfig.for_model(model_type, **{**common, **special, **fields})


def _mlp_of(block: nn.Module) -> nn.Module | None:
    """The MLP of a decoder layer, as the families call it."""
    if getattr(block, "block_type", "mlp") in ("linear_attention", "full_attention"):
        return None
    names = ("mlp", "feed_forward", "mixer") if hasattr(block, "block_type") else ("mlp", "feed_forward")
    return next((getattr(block, name) for name in names if hasattr(block, name)), None)


def _randomise_vectors(model: nn.Module) -> None:
    """Move norms and biases off their trivial initial values, which would hide a misplaced one."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    # Biases of experts have two dimensions; those that choose between experts are no parameters.
    chosen = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    biases = [p for name, p in model.named_parameters() if name.endswith("_bias") and p.dim() == 2]
    for tensor in [*biases, *chosen]:
        tensor.data += 0.1 * torch.randn_like(tensor)


def _converted(architecture: str, hf: PreTrainedModel) -> Path:
    digest = hashlib.sha256(json.dumps(hf.config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(tokenizer().backend_tokenizer.to_str().encode())
    for name, tensor in hf.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            hf.save_pretrained(directory)
            tokenizer().save_pretrained(directory)
            converter.convert(_llama_cpp(), Path(directory), target)

    digest.update(transformers.__version__.encode() + Path(converter.__file__).read_bytes())
    return cached_file(f"{architecture}-{digest.hexdigest()[:16]}", write)


def _llama_cpp() -> Path:
    llama_cpp: Path = source_tree() / "vendor" / "llama.cpp"
    return llama_cpp


def cached_file(stem: str, write: Callable[[Path], None]) -> Path:
    """`.cache/test-models/{stem}.gguf`, written once, under a temporary name until it is whole."""
    path = CACHE / f"{stem}.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        try:
            write(unfinished)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path
