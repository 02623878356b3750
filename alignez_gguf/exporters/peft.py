"""The removals as a PEFT adapter, for the transformers model of the same weights: what vLLM and others load.

The same algebra as in `stock`: B = -V^T and A = V W on `down_proj`. W is dequantised from the GGUF file, so
the removal is exact for a model of just these weights, and as near as the quantization for the original ones.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.errors import OutputError, SteeringError
from alignez_gguf.exporters.stock import lora
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.progress import Reporter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_MODULE = "model.layers.{layer}.mlp.down_proj"
_ARCHITECTURES = frozenset(
    {
        "apertus",
        "cohere2",
        "command-r",
        "exaone",
        "gemma",
        "gemma2",
        "gemma3",
        "glm4",
        "granite",
        "llama",
        "mistral3",
        "nemotron",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
    }
)
"""Those whose dense MLP is `_MODULE` in transformers, with a weight that the converter only renames."""


def write(
    control: ControlFile, weights: ModelWeights, output: Path, progress: Reporter | None = None
) -> list[Path]:
    """Write the folder `output` with adapter_config.json and adapter_model.safetensors, whole or not at all.

    Raises:
        SteeringError: the control adds, or the model is not one whose `down_proj` a LoRA can edit.
        ModelFileError: a weight cannot be dequantised.
        OutputError: the folder cannot be written, or exists and holds something else.
    """
    from safetensors.numpy import save_file

    _refuse(control, weights)
    rank = max(edit.rank for edit in control.edits.values())
    tensors = {}
    for name, pair in lora(control.edits, weights, progress).items():
        module = f"base_model.model.{_MODULE.format(layer=name.split('.')[1])}"
        # One rank for all, as vLLM wants it; rows of zeros do nothing.
        missing = rank - len(pair.a)
        tensors[f"{module}.lora_A.weight"] = np.pad(pair.a.astype(np.float32), ((0, missing), (0, 0)))
        tensors[f"{module}.lora_B.weight"] = np.pad(pair.b, ((0, 0), (0, missing)))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["down_proj"],
        "layers_to_transform": sorted(control.edits),
        "layers_pattern": "layers",
    }
    if output.exists() and not _is_adapter(output):
        raise OutputError(f"{output} exists and is not an adapter; choose another place for the output")
    try:
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp"))
        try:
            folder.chmod(0o777 & ~_umask())
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            if output.exists():
                shutil.rmtree(output)
            folder.replace(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {output}: {error.strerror or error}; choose another place for the output"
        ) from error
    return [output / CONFIG, output / WEIGHTS]


def _refuse(control: ControlFile, weights: ModelWeights) -> None:
    adding = [layer for layer, edit in control.edits.items() if edit.decision.endswith("add")]
    if adding:
        raise SteeringError(
            f"the control adds at layer {adding[0]}, and a LoRA cannot add a constant; use --format stock or "
            "merged, or export a control that only removes"
        )
    arch = weights.info.arch
    if arch not in _ARCHITECTURES:
        raise SteeringError(
            f"where transformers keeps the MLP of {arch} models is not known here; use --format stock or "
            "merged"
        )
    for layer in control.edits:
        for down in weights.down_projections(layer):
            if down.kind == "experts" or down.bias is not None:
                what = "a mixture of experts" if down.kind == "experts" else "a bias"
                raise SteeringError(
                    f"the MLP of layer {layer} has {what}, which a LoRA on down_proj does not reach; "
                    "use --format stock or merged"
                )


def _is_adapter(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {CONFIG, WEIGHTS}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
