"""Identifies a transformers model: the counterpart of `ModelInfo.from_gguf`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from alignez_gguf.control.model_info import ModelInfo

_OTHER_NAMES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "glm": "chatglm",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "internlm3": "llama",
    "llama4_text": "llama4",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
}
"""Model types of transformers that llama.cpp's converter calls by another name (its conversion/*.py)."""

_WEIGHTS = ("*.safetensors", "*.bin")
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def model_info(config: Any, folder: Path, name: str, dtype: Any) -> ModelInfo:
    """Describe a model as its GGUF file would be.

    Args:
        config: of the text model.
        folder: holds config.json and the weights.
        name: a path or a hub id.
        dtype: of the weights in memory, a `torch.dtype`.
    """
    return ModelInfo(
        arch=gguf_architecture(config.model_type),
        n_embd=int(config.hidden_size),
        n_layer=int(config.num_hidden_layers),
        name=Path(name).resolve().name if Path(name).exists() else name.rsplit("/", 1)[-1],
        fingerprint=_fingerprint(folder),
        quantization=_TYPES.get(str(dtype).removeprefix("torch."), ""),
    )


def gguf_architecture(model_type: str) -> str:
    """`general.architecture` of the GGUF file of a model type; the type itself where llama.cpp knows none."""
    import gguf

    if model_type in _OTHER_NAMES:
        return _OTHER_NAMES[model_type]
    known = {_plain(name): str(name) for name in gguf.MODEL_ARCH_NAMES.values()}
    return known.get(_plain(model_type), model_type)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")


def _fingerprint(folder: Path) -> str:
    """SHA-256 of config.json and of every weight file its name, size and 64 samples of 4 KiB.

    The first sample is the header of a safetensors file. The samples tell fine-tunes apart in milliseconds.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
