"""The two functions that the patch adds to llama.cpp, called through ctypes.

`patches/` has their C side. Nothing above `runtime` knows of pointers: a context is passed as the opaque
`llama_context *` that llama-cpp-python hands out.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.edits import Edits, check_strength
from alignez_gguf.errors import RuntimeUnavailableError, SteeringError
from alignez_gguf.runtime.log import captured_log

SYMBOL = "llama_set_adapter_edit"
"""Exported by a libllama that carries the patch."""

_FLOATS = ctypes.POINTER(ctypes.c_float)


class _LayerEdit(ctypes.Structure):
    """`struct llama_layer_edit` of the patched llama.h."""

    _fields_ = (
        ("il", ctypes.c_int32),
        ("n_remove", ctypes.c_int32),
        ("remove", _FLOATS),
        ("add", _FLOATS),
    )


@cache
def _library() -> Any:
    try:
        import llama_cpp.llama_cpp as bindings
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"llama-cpp-python cannot be loaded ({error}); run: alignez-gguf runtime build"
        ) from error
    return bindings._lib


def is_patched() -> bool:
    """Whether the loaded llama.cpp has the patch. Raises `RuntimeUnavailableError` if there is none."""
    return hasattr(_library(), SYMBOL)


def require_patched() -> None:
    """Raise `RuntimeUnavailableError` where the loaded llama.cpp lacks the patch."""
    if not is_patched():
        raise RuntimeUnavailableError(
            "the installed llama-cpp-python lacks the steering patch; run: alignez-gguf runtime build"
        )


@cache
def _functions() -> tuple[Any, Any]:
    require_patched()
    set_edit = _library().llama_set_adapter_edit
    set_edit.argtypes = [ctypes.c_void_p, ctypes.POINTER(_LayerEdit), ctypes.c_size_t, ctypes.c_int32]
    set_edit.restype = ctypes.c_int32
    set_strength = _library().llama_set_adapter_edit_strength
    set_strength.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_float,
        ctypes.c_int32,
        ctypes.c_int32,
    ]
    set_strength.restype = ctypes.c_int32
    return set_edit, set_strength


def _pointer(array: NDArray[np.float32] | None) -> Any:
    """The array's own memory, which the edit that owns it keeps alive."""
    return None if array is None else array.ctypes.data_as(_FLOATS)


def set_edits(context: Any, edits: Edits, n_embd: int) -> None:
    """Replace the edits of a context, as a whole; no edits clear them.

    Every sequence starts at strength 1 for all positions. llama.cpp copies the vectors.

    Raises:
        SteeringError: llama.cpp refuses them; the former edits are still in force.
        RuntimeUnavailableError: the patch is missing.
    """
    set_edit, _ = _functions()
    edited = [(layer, edit) for layer, edit in sorted(edits.items()) if edit.decision != "none"]
    layer_edits = (_LayerEdit * len(edited))(
        *(
            _LayerEdit(il=layer, n_remove=edit.rank, remove=_pointer(edit.remove), add=_pointer(edit.add))
            for layer, edit in edited
        )
    )
    with captured_log() as log:
        status = set_edit(context, layer_edits, len(edited), n_embd)
    if status != 0:
        raise SteeringError(f"llama.cpp cannot apply the edit: {log.reason()}")


def set_strength(
    context: Any, strength: float, *, sequence: int = -1, first: int = 0, end: int | None = None
) -> None:
    """Set the strength of the tokens of a sequence (-1: of all) at positions `first` to `end` (exclusive).

    Tokens at other positions of the sequence are left as the model made them.

    Raises:
        SteeringError: a negative or non-finite strength, no edit, or no such sequence.
    """
    _, set_sequence_strength = _functions()
    value = check_strength(strength)
    if set_sequence_strength(context, sequence, value, first, -1 if end is None else end) != 0:
        raise SteeringError(
            f"sequence {sequence} cannot be given a strength: no edit is set, or there is no such sequence"
        )
