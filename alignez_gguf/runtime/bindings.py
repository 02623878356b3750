"""Through ctypes: the functions that the patch adds to llama.cpp, some of ggml's, and llama.cpp's log.

`patches/` has the C side of the patch. Nothing above `runtime` knows of pointers: a context is passed as the
opaque `llama_context *` that llama-cpp-python hands out.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit, check_strength
from alignez_gguf.errors import RuntimeUnavailableError, SteeringError
from alignez_gguf.runtime.version import VERSION

SYMBOL = "llama_set_adapter_edits"
"""Exported by a libllama that carries the patch."""

PATCH_VERSION = 2
"""LLAMA_LAYER_EDIT_VERSION of the patched llama.h that this module is written for."""

_GPUS = (1, 2)
"""GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU of ggml-backend.h."""

_FLOATS = ctypes.POINTER(ctypes.c_float)

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT: goes on with the line before


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


def declared(function: Any, result: Any, *arguments: Any) -> Any:
    """A function of a library, with the ctypes of its result and its arguments."""
    function.restype, function.argtypes = result, arguments
    return function


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
    declared(base.ggml_op_desc, ctypes.c_char_p, pointer)
    declared(base.ggml_backend_tensor_get, None, pointer, pointer, size, size)
    declared(base.ggml_quantize_requires_imatrix, ctypes.c_bool, ctypes.c_int)
    declared(base.ggml_quantize_chunk, size, ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer)
    return base


def has_gpu() -> bool:
    """Whether ggml knows of a GPU, here or behind an RPC server.

    `llama_supports_gpu_offload` says so of any build with RPC, even with no server.
    """
    by_type = declared(ggml().ggml_backend_dev_by_type, ctypes.c_void_p, ctypes.c_int)
    return any(by_type(kind) for kind in _GPUS)


@cache
def cpu_features() -> frozenset[str]:
    """Return the CPU features that ggml was built with and finds, by its own names, such as AVX2."""
    info = _library().llama_print_system_info().decode(errors="replace")
    return frozenset(re.findall(r"(\w+) = 1", info))


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
    library, pointer, number = _library(), ctypes.c_void_p, ctypes.c_int32
    edits = (ctypes.POINTER(_LayerEdit), ctypes.c_size_t)
    sequence, positions = number, (number, number)
    return (
        declared(library.llama_set_adapter_edits, number, pointer, *edits, number),
        declared(
            library.llama_set_adapter_edit_strength,
            number,
            *(pointer, number, sequence, ctypes.c_float),
            *positions,
        ),
    )


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


def set_edits(context: Any, edits: Edits) -> None:
    """Replace what edits a context by one control, or by none if `edits` is empty; see `set_controls`."""
    set_controls(context, [edits])


def set_controls(context: Any, controls: Sequence[Edits]) -> None:
    """Replace what edits a context, as a whole, by the edits of `controls`, which act in this order.

    x <- (I - s_n P_n) ... (I - s_1 P_1) x, with a strength s of each control; their additions are summed.
    Every sequence starts at strength 1 for all positions. llama.cpp copies the vectors.

    Raises:
        SteeringError: llama.cpp refuses them; the former edits are still in force.
        RuntimeUnavailableError: the patch is missing.
    """
    import llama_cpp

    set_edit, _ = _functions()
    n_embd = int(llama_cpp.llama_model_n_embd(llama_cpp.llama_get_model(context)))
    layer_edits: list[_LayerEdit] = []
    for number, edits in enumerate(controls):
        for layer, edit in sorted(edits.items()):
            if edit.n_embd not in (None, n_embd):  # llama.cpp would read on behind the end of the vectors
                raise SteeringError(
                    f"the edit of layer {layer} has width {edit.n_embd}, and the model {n_embd}; use "
                    "one that was made for this model"
                )
            layer_edits += _layer_edits(layer, number, edit)
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


class CapturedLog:
    """The error lines of llama.cpp, in order.

    It returns a bare status and says the reason in its log, so the reason has to be caught there.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._level = 0
        """The level of the line that is being written."""

    def reason(self) -> str:
        """The first error, which is the cause of those that follow it."""
        return self.errors[0].strip() if self.errors else "llama.cpp gave no reason"

    def receive(self, level: int, text: bytes) -> None:
        """Take a part of the log, as llama.cpp hands it out."""
        continued = level == _CONTINUED
        self._level = self._level if continued else level
        if self._level != _ERROR:
            return
        line = text.decode("utf-8", errors="replace")
        if continued and self.errors:
            self.errors[-1] += line
        else:
            self.errors.append(line)


@contextmanager
def captured_log() -> Iterator[CapturedLog]:
    """Keep llama.cpp's log of this thread away from the terminal and collect its errors.

    Other threads go on as before: each captures its own log, and what nobody captures goes where it went.
    """
    log = CapturedLog()
    logs = _logs_of_thread()
    _begin_capture()
    logs.append(log)
    try:
        yield log
    finally:
        logs.remove(log)
        _end_capture()


_thread = threading.local()
_lock = threading.Lock()
_n_captures = 0
_former: Any = None
_former_data: Any = None


def _logs_of_thread() -> list[CapturedLog]:
    logs: list[CapturedLog] = vars(_thread).setdefault("logs", [])
    return logs


@cache
def _callback() -> Any:
    """Never freed: llama.cpp has one callback per process, and may be about to call it in any thread."""
    import llama_cpp

    def receive(level: int, text: bytes, _: object) -> None:
        if logs := _logs_of_thread():
            logs[-1].receive(level, text)
        elif _former:
            _former(level, text, _former_data)

    return llama_cpp.llama_log_callback(receive)


def _begin_capture() -> None:
    """Put our callback in the place of the one that is there."""
    import llama_cpp

    global _n_captures, _former, _former_data
    with _lock:
        current, data = _current_callback()
        if _address(current) != _address(_callback()):
            _former, _former_data = current, data
            llama_cpp.llama_log_set(_callback(), ctypes.c_void_p())
        _n_captures += 1


def _end_capture() -> None:
    """Give the place back after the last capture, unless somebody else has taken it meanwhile."""
    import llama_cpp

    global _n_captures
    with _lock:
        _n_captures -= 1
        if _n_captures == 0 and _address(_current_callback()[0]) == _address(_callback()):
            llama_cpp.llama_log_set(_former, _former_data)


def _current_callback() -> tuple[Any, ctypes.c_void_p]:
    import llama_cpp

    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return callback, data


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
