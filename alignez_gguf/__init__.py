"""Give a quantized language model a safety alignment: no labels, no training, on your own machine."""

from alignez_gguf.control import ControlFile, ModelInfo
from alignez_gguf.edits import LayerEdit
from alignez_gguf.errors import AlignezError
from alignez_gguf.runtime.steering import Steering, steer

__all__ = ["AlignezError", "ControlFile", "LayerEdit", "ModelInfo", "Steering", "steer"]
__version__ = "0.1.0"
