"""Reads the MLP output of every layer out of llama.cpp's graph while it computes.

Which node that is, is decided by what computes it and not by its name, so it holds for any architecture
that names its weights in the usual way: the nodes of a layer that are linear in the layer's down
projections (`blk.N.ffn_down`, and of a mixture `_exps` and `_shexp`), and of those the last. The residual
add, a norm after the MLP and a residual scale all end that set.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.errors import ModelFileError

_DOWN_PROJECTION = re.compile(rb"blk\.(\d+)\.ffn_down(?:_exps|_shexp)?\.(?:weight|bias)")
_PRODUCTS = frozenset({b"MUL_MAT", b"MUL_MAT_ID"})
_SHAPING = frozenset({b"VIEW", b"RESHAPE", b"CONT", b"PERMUTE", b"TRANSPOSE", b"SUM_ROWS", b"REPEAT"})
_F32 = 0  # GGML_TYPE_F32
_MAX_FLOAT16 = float(np.finfo(np.float16).max)


class _Tensor(ctypes.Structure):
    """The beginning of `struct ggml_tensor` in ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class MlpOutputReader:
    """Takes the MLP outputs of the last token of a decode.

    Args:
        architecture: for messages.
        n_layer: how many layers the model has.
        n_embd: the width of its residual stream.

    Attributes:
        on_node: to be given to the `Context` that decodes. Costs little while the reader is not armed.
    """

    def __init__(self, architecture: str, n_layer: int, n_embd: int) -> None:
        self._architecture = architecture
        self._shape = (n_layer, n_embd)
        self._linear = _LinearInDownProjections()
        self._wanted: dict[tuple[bytes, int], int] | None = None
        self._armed = False
        self._seen: dict[bytes, int] = {}
        self._layer = -1
        self._rows = np.empty(self._shape, np.float32)
        self._read: set[int] = set()
        self._error: BaseException | None = None
        self.on_node: Any = llama.ggml_backend_sched_eval_callback(self._safely_visit)

    @property
    def knows_graph(self) -> bool:
        """Whether a first decode has shown where the MLP outputs are; until then nothing can be taken."""
        return self._wanted is not None

    def arm(self) -> None:
        """Watch the next decode. It must be one of a single sequence, with logits for its last token."""
        self._armed = True
        self._seen.clear()
        self._read.clear()

    def learn(self) -> None:
        """After the first watched decode: fix which nodes to read.

        Raises:
            ModelFileError: a layer has no MLP output that can be told with certainty.
        """
        self._disarm()
        n_layer = self._shape[0]
        found = self._linear.last_of_layer
        missing = [layer for layer in range(n_layer) if layer not in found]
        if missing or len(found) != n_layer:
            raise ModelFileError(
                f"the MLP output of layer {missing[0] if missing else n_layer} cannot be found in the graph "
                f"of the architecture {self._architecture!r}; use a model of another architecture"
            )
        self._wanted = {node: layer for layer, node in found.items()}

    def take(self) -> NDArray[np.float16]:
        """After a watched decode: the MLP outputs of its last token, [n_layer, n_embd]."""
        self._disarm()
        if len(self._read) != self._shape[0]:
            raise RuntimeError(f"read {len(self._read)} of {self._shape[0]} layers")
        # Massive activations of some models exceed float16.
        return np.clip(self._rows, -_MAX_FLOAT16, _MAX_FLOAT16).astype(np.float16)

    def _disarm(self) -> None:
        self._armed = False
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _safely_visit(self, tensor: int, ask: bool, _: object) -> bool:
        """ctypes would print an exception and go on; keep it for the caller instead."""
        if not self._armed:
            return False
        try:
            return self._visit(tensor, ask)
        except BaseException as error:
            self._armed = False
            self._error = error
            return False

    def _visit(self, tensor: int, ask: bool) -> bool:
        """llama.cpp asks of each node, in order, whether it is wanted, and shows those that are, computed."""
        if not ask:
            self._copy_last_row(tensor)
            return True
        name = _name(tensor)
        occurrence = self._seen.get(name, 0)
        self._seen[name] = occurrence + 1
        if self._wanted is None:
            self._linear.visit(tensor, (name, occurrence))
            return False
        self._layer = self._wanted.get((name, occurrence), -1)
        return self._layer >= 0

    def _copy_last_row(self, address: int) -> None:
        tensor = _Tensor.from_address(address)
        n_embd = self._shape[1]
        size = 4 * n_embd
        if (
            tensor.type != _F32
            or tensor.ne[0] != n_embd
            or tensor.nb[0] != 4
            or tensor.ne[2] * tensor.ne[3] != 1
        ):
            raise ModelFileError(f"the MLP output of {self._architecture!r} has an unexpected shape or type")
        # In the last layer only the row with logits is left, which is the last row too.
        offset = (tensor.ne[1] - 1) * tensor.nb[1]
        _ggml().ggml_backend_tensor_get(address, self._rows[self._layer].ctypes.data, offset, size)
        self._read.add(self._layer)


class _LinearInDownProjections:
    """Finds, in one walk through a graph, the last node of each layer that is linear in down projections."""

    def __init__(self) -> None:
        self.last_of_layer: dict[int, tuple[bytes, int]] = {}
        self._layer_of: dict[int, int] = {}

    def visit(self, address: int, node: tuple[bytes, int]) -> None:
        layer = self._layer(address)
        if layer is not None:
            self._layer_of[address] = layer
            self.last_of_layer[layer] = node

    def _layer(self, address: int) -> int | None:
        operation = bytes(_ggml().ggml_op_desc(address))
        sources = [source for source in _Tensor.from_address(address).src if source]
        if not sources:
            return None
        if operation in _PRODUCTS:
            match = _DOWN_PROJECTION.search(_name(sources[0]))
            return int(match[1]) if match else None
        layers = {self._layer_of.get(source) for source in sources}
        if operation in (b"ADD", b"ADD_ID"):
            # A bias of the projection keeps the sum linear in it; the residual stream does not.
            others = [s for s in sources if s not in self._layer_of and not _DOWN_PROJECTION.search(_name(s))]
            layers.discard(None)
            return layers.pop() if len(layers) == 1 and not (operation == b"ADD" and others) else None
        if operation == b"MUL":
            layers.discard(None)  # the weight of an expert, or the gate of the shared one
            return layers.pop() if len(layers) == 1 else None
        return self._layer_of.get(sources[0]) if operation in _SHAPING else None


def _name(address: int) -> bytes:
    return bytes(_Tensor.from_address(address).name)


@cache
def _ggml() -> Any:
    """libggml-base; its functions are not bound by llama-cpp-python."""
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml_base_path

    library = load_shared_library("ggml-base", libggml_base_path)
    library.ggml_op_desc.argtypes = [ctypes.c_void_p]
    library.ggml_op_desc.restype = ctypes.c_char_p
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    library.ggml_backend_tensor_get.restype = None
    return library
