"""Which way the edits of a model reach llama.cpp."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignez_gguf.errors import AlignezError, ModelFileError, RuntimeUnavailableError
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.runtime import library, probe

_CHILD = "alignez_gguf.runtime.reach_child"


@dataclass(frozen=True)
class Reach:
    """What `steer` does with a model.

    Attributes:
        steers: the way it takes: the patch, the adapters of stock llama.cpp, or none.
        reason: why not the way before it; empty for the patch.
    """

    steers: Literal["patched", "stock", "no"]
    reason: str = ""


def reach_of(path: Path) -> Reach:
    """Try to edit every layer of a model, in a child process, without computing anything.

    Raises:
        ModelFileError: the model cannot be loaded.
        RuntimeUnavailableError: there is no llama.cpp.
    """
    reason = "the patch is missing"
    if library.is_patched():
        reason = _why_not_patched(path)
        if not reason:
            return Reach("patched")
    try:
        weights = ModelWeights(path)
        for layer in range(weights.info.n_layer):
            for down in weights.down_projections(layer):
                down.weight.dequantised(0, 1)
    except AlignezError as error:
        return Reach("no", f"{reason}; {error}")
    return Reach("stock", reason)


def _why_not_patched(path: Path) -> str:
    """Why the patch does not reach every layer; empty where it does."""
    child = probe.run_module(_CHILD, str(path))
    if probe.was_killed(child.returncode):
        return f"llama.cpp ends with {probe.signal_name(child.returncode)} where every layer is edited"
    lines = child.stdout.splitlines()
    if child.returncode != 0 or not lines:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise RuntimeUnavailableError(f"the patch cannot be tried ({last}); run: alignez-gguf runtime status")
    found: dict[str, str] = json.loads(lines[-1])
    if found["kind"] == ModelFileError.__name__:
        raise ModelFileError(found["message"])
    return found["message"]
