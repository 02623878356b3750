"""Give a quantized language model a safety alignment: no labels, no training, on your own machine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.edits import LayerEdit
    from alignez_gguf.control.model_info import ModelInfo
    from alignez_gguf.errors import AlignezError
    from alignez_gguf.steering.steer import Steering, steer
    from alignez_gguf.steering.steered_llama import SteeredLlama
    from alignez_gguf.steering.transformers import steer_transformers

__all__ = [
    "AlignezError",
    "ControlFile",
    "LayerEdit",
    "ModelInfo",
    "SteeredLlama",
    "Steering",
    "steer",
    "steer_transformers",
]
__version__ = "0.1.0"

_LAZY_EXPORTS = {
    "AlignezError": "errors",
    "ControlFile": "control.control_file",
    "LayerEdit": "control.edits",
    "ModelInfo": "control.model_info",
    "SteeredLlama": "steering.steered_llama",
    "Steering": "steering.steer",
    "steer": "steering.steer",
    "steer_transformers": "steering.transformers",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the command line starts without numpy."""
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
