"""Run in a child process by `reach`: sets an edit of every layer of a model, and may die of it.

An assert of ggml ends the process, which the caller outlives. Prints a line of JSON: the kind of error, if
there was one, and its message.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from alignez_gguf.edits import LayerEdit
from alignez_gguf.errors import ModelFileError, SteeringError
from alignez_gguf.runtime.attached import Patched
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model


def edit_all_layers(path: Path) -> None:
    """Set a removal at every layer.

    Raises:
        ModelFileError: the model cannot be loaded.
        SteeringError: a layer is out of reach.
    """
    with Model(path, n_gpu_layers=0) as model, Context(model, n_ctx=16) as context:
        info = model.info
        edit = LayerEdit(remove=np.eye(1, info.n_embd, dtype=np.float32))
        Patched(context.pointer, dict.fromkeys(range(info.n_layer), edit)).detach()


if __name__ == "__main__":
    found = {"kind": "", "message": ""}
    try:
        edit_all_layers(Path(sys.argv[1]))
    except (ModelFileError, SteeringError) as error:
        found = {"kind": type(error).__name__, "message": str(error)}
    print(json.dumps(found))
