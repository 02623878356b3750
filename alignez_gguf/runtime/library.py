"""The two functions that the patch adds to llama.cpp, and those of ggml below it, called through ctypes.

`patches/` has their C side. Nothing above `runtime` knows of pointers: a context is passed as the opaque
`llama_context *` that llama-cpp-python hands out.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.edits import Edits, LayerEdit, check_strength
from alignez_gguf.errors import RuntimeUnavailableError, SteeringError
from alignez_gguf.runtime.log import captured_log
from alignez_gguf.runtime.source import VERSION

SYMBOL = "llama_set_adapter_edits"
"""Exported by a libllama that carries the patch."""

PATCH_VERSION = 2
"""LLAMA_LAYER_EDIT_VERSION of the patched llama.h that this module is written for."""

_GPUS = (1, 2)
"""GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU of ggml-backend.h."""

_FLOATS = ctypes.POINTER(ctypes.c_float)


class _LayerEdit(ctypes.Structure):
    """`struct llama_layer_edit` of the patched llama.h."""

    _fields_ = (
        ("il", ctypes.c_int32),
        ("id", ctypes.c_int32),
        ("is_ffn", ctypes.c_bool),
        ("k", ctypes.c_int32),
        ("u", _FLOATS),
        ("v", _FLOATS),
        ("b", _FLOATS),
    )
    arrays: tuple[NDArray[np.float32] | None, ...] = ()
    """The arrays that the pointers point into, kept alive here, since ctypes does not."""


@cache
def _library() -> Any:
    try:
        import llama_cpp.llama_cpp as bindings
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeUnavailableError(
            f"llama-cpp-python cannot be loaded ({error}); run: alignez-gguf runtime build"
        ) from error
    _check_version()
    return bindings._lib


def _check_version() -> None:
    """Refuse other versions: structs of ggml and the format of saved states are mirrored here and above."""
    import llama_cpp

    if llama_cpp.__version__ != VERSION:
        raise RuntimeUnavailableError(
            f"llama-cpp-python is {llama_cpp.__version__}, and alignez-gguf is made for {VERSION}; "
            "run: alignez-gguf runtime build"
        )


def require_supported() -> None:
    """Raise `RuntimeUnavailableError` where there is no llama-cpp-python, or one of another version."""
    _library()


def ggml() -> Any:
    """The library with ggml's registry of devices. Raises `RuntimeUnavailableError` if there is none."""
    if hasattr(_library(), "ggml_backend_dev_by_type"):
        return _library()
    from llama_cpp._ggml import libggml  # Windows: a library does not pass on the symbols of those it loads

    return libggml


@cache
def ggml_base() -> Any:
    """libggml-base, of which llama-cpp-python binds no function.

    Raises:
        RuntimeUnavailableError: there is no llama.cpp.
    """
    _library()
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml_base_path

    base = load_shared_library("ggml-base", libggml_base_path)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for function, result, *arguments in (
        (base.ggml_op_desc, ctypes.c_char_p, pointer),
        (base.ggml_backend_tensor_get, None, pointer, pointer, size, size),
        (base.ggml_quantize_requires_imatrix, ctypes.c_bool, ctypes.c_int),
        (base.ggml_quantize_chunk, size, ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer),
    ):
        function.argtypes, function.restype = arguments, result
    return base


def has_gpu() -> bool:
    """Whether ggml knows of a GPU, here or behind an RPC server.

    `llama_supports_gpu_offload` says so of any build with RPC, even with no server.
    """
    by_type = ggml().ggml_backend_dev_by_type
    by_type.argtypes, by_type.restype = [ctypes.c_int], ctypes.c_void_p
    return any(by_type(kind) for kind in _GPUS)


@cache
def cpu_features() -> frozenset[str]:
    """What ggml's CPU code was built with and finds, by its own names, such as AVX2."""
    said = _library().llama_print_system_info().decode(errors="replace")
    return frozenset(re.findall(r"(\w+) = 1", said))


def is_patched() -> bool:
    """Whether the loaded llama.cpp has the patch.

    Raises:
        RuntimeUnavailableError: there is no llama.cpp, or it has another version of the patch.
    """
    version = patch_version(_library())
    if version is None:
        return False
    if version != PATCH_VERSION:
        raise RuntimeUnavailableError(other_patch(version))
    return True


def patch_version(library: Any) -> int | None:
    """The version of the patch in a libllama, 0 for those before it had one; None where it is not patched."""
    if not hasattr(library, SYMBOL):
        return None
    return int(library.llama_layer_edit_version()) if hasattr(library, "llama_layer_edit_version") else 0


def other_patch(version: int) -> str:
    """The error of a library with another version of the patch."""
    return (
        f"the installed llama-cpp-python has version {version} of the steering patch, and alignez-gguf is "
        f"made for version {PATCH_VERSION}; run: alignez-gguf runtime build"
    )


def require_patched() -> None:
    """Raise `RuntimeUnavailableError` where the loaded llama.cpp lacks the patch."""
    if not is_patched():
        raise RuntimeUnavailableError(
            "the installed llama-cpp-python lacks the steering patch; run: alignez-gguf runtime build"
        )


@cache
def _functions() -> tuple[Any, Any]:
    require_patched()
    set_edit = _library().llama_set_adapter_edits
    set_edit.argtypes = [ctypes.c_void_p, ctypes.POINTER(_LayerEdit), ctypes.c_size_t, ctypes.c_int32]
    set_edit.restype = ctypes.c_int32
    set_strength = _library().llama_set_adapter_edit_strength
    set_strength.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_float,
        ctypes.c_int32,
        ctypes.c_int32,
    ]
    set_strength.restype = ctypes.c_int32
    return set_edit, set_strength


def _layer_edit(
    layer: int,
    control: int,
    is_ffn: bool,
    u: NDArray[np.float32] | None,
    v: NDArray[np.float32] | None,
    b: NDArray[np.float32] | None,
) -> _LayerEdit:
    """x <- x + s (U V^T x + b), with U [n_embd, k] and V as rows [k, n_embd], C-contiguous."""
    pointers = [None if array is None else array.ctypes.data_as(_FLOATS) for array in (u, v, b)]
    edit = _LayerEdit(layer, control, is_ffn, 0 if v is None else len(v), *pointers)
    edit.arrays = (u, v, b)
    return edit


def _layer_edits(layer: int, control: int, edit: LayerEdit) -> Iterator[_LayerEdit]:
    """The edit of a layer in llama.cpp's form: of the MLP output, and of the block's."""
    if edit.edits_mlp:
        u = None if edit.remove is None else np.ascontiguousarray((edit.gains[:, None] * edit.remove).T)
        yield _layer_edit(layer, control, True, u, edit.remove, edit.bias)
    if edit.add is not None:
        yield _layer_edit(layer, control, False, None, None, edit.add)


def set_edits(context: Any, edits: Edits, n_embd: int) -> None:
    """Replace what edits a context by one control, or by none if `edits` is empty; see `set_controls`."""
    set_controls(context, [edits], n_embd)


def set_controls(context: Any, controls: Sequence[Edits], n_embd: int) -> None:
    """Replace what edits a context, as a whole, by the edits of `controls`, which act in this order.

    x <- (I - s_n P_n) ... (I - s_1 P_1) x, with a strength s of each control; their additions are summed.
    Every sequence starts at strength 1 for all positions. llama.cpp copies the vectors.

    Raises:
        SteeringError: llama.cpp refuses them; the former edits are still in force.
        RuntimeUnavailableError: the patch is missing.
    """
    set_edit, _ = _functions()
    for layer, width in ((layer, edit.n_embd) for edits in controls for layer, edit in edits.items()):
        if width not in (None, n_embd):  # llama.cpp would read on behind the end of the vectors
            raise SteeringError(
                f"the edit of layer {layer} has width {width}, and the model {n_embd}; use one that was made "
                "for this model"
            )
    layer_edits = [
        one
        for number, edits in enumerate(controls)
        for layer, edit in sorted(edits.items())
        for one in _layer_edits(layer, number, edit)
    ]
    with captured_log() as log:
        status = set_edit(context, (_LayerEdit * len(layer_edits))(*layer_edits), len(layer_edits), n_embd)
    if status != 0:
        raise SteeringError(f"llama.cpp cannot apply the edit: {log.reason()}")


def set_strength(
    context: Any,
    strength: float,
    *,
    control: int = 0,
    sequence: int = -1,
    first: int = 0,
    end: int | None = None,
) -> None:
    """Set the strength of the tokens of a sequence (-1: of all) at positions `first` to `end` (exclusive).

    Tokens at other positions of the sequence are not edited by `control`, a number in `set_controls`.

    Raises:
        SteeringError: a negative or non-finite strength, no edit, or no such sequence.
    """
    _, set_sequence_strength = _functions()
    value, stop = check_strength(strength), -1 if end is None else end
    if set_sequence_strength(context, control, sequence, value, first, stop) != 0:
        raise SteeringError(
            f"sequence {sequence} cannot be given a strength: no edit is set, or there is no such sequence"
        )
