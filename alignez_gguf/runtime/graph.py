"""Which nodes of llama.cpp's graph are the outputs of a layer, decided while the graph is computed.

Nodes are told by what computes them, so this holds for any architecture that names its weights in the usual
way. Where something cannot be told with certainty it is not found.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

from numpy.typing import NDArray

from alignez_gguf.runtime.library import ggml_base

Node = tuple[bytes, int]
"""A node that can be found again in the next graph: its name, and how many before it have the same."""

F32 = 0  # GGML_TYPE_F32

_WEIGHT_OF_LAYER = re.compile(rb"blk\.(\d+)\.")
_WEIGHT_OF_HEAD = re.compile(rb"(?:^|#)(?:output|token_embd)[^#]*\.(?:weight|bias)")
_DOWN_PROJECTION = re.compile(rb"blk\.(\d+)\.ffn_down(?:_exps|_shexp|_chexps)?\.(?:weight|bias)")
_BLOCK_OUTPUT = re.compile(rb"l_out-(\d+)")
_COPY = re.compile(rb"[^#]+#(.+)#\d+")
"""What the scheduler calls the copy of a node for another device (ggml_backend_sched_split_graph)."""

_PRODUCTS = frozenset({b"MUL_MAT", b"MUL_MAT_ID"})
_SHAPING = frozenset({b"VIEW", b"RESHAPE", b"CONT", b"PERMUTE", b"TRANSPOSE", b"SUM_ROWS", b"REPEAT"})


class Tensor(ctypes.Structure):
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


def name_of(address: int) -> bytes:
    return bytes(Tensor.from_address(address).name)


def copy_rows(address: int, rows: NDArray[Any]) -> None:
    """Fill `rows` [n, width], contiguous float32, with the last n rows of a computed F32 matrix."""
    tensor = Tensor.from_address(address)
    count, size = len(rows), rows.shape[1] * 4
    offset = (tensor.ne[1] - count) * tensor.nb[1]
    if tensor.nb[1] == size:
        ggml_base().ggml_backend_tensor_get(address, rows.ctypes.data, offset, count * size)
        return
    for row in rows:
        ggml_base().ggml_backend_tensor_get(address, row.ctypes.data, offset, size)
        offset += tensor.nb[1]


class MlpOutputs:
    """Finds the MLP outputs.

    That of a layer is the last of the nodes that are linear in its down projections (`blk.N.ffn_down`, and of
    a mixture `_exps`, `_shexp` and `_chexps`). The residual add, a norm after the MLP and a residual scale
    end that set.
    """

    def __init__(self) -> None:
        self.of_layer: dict[int, Node] = {}
        self._layer_of: dict[int, int] = {}

    def visit(self, address: int, node: Node) -> None:
        """To be called with every node of a graph, in order."""
        layer = self._layer(address)
        if layer is not None:
            self._layer_of[address] = layer
            self.of_layer[layer] = node

    def _layer(self, address: int) -> int | None:
        operation = operation_of(address)
        sources = sources_of(address)
        if not sources:
            return None
        if operation in _PRODUCTS:
            match = _DOWN_PROJECTION.search(name_of(sources[0]))
            return int(match[1]) if match else None
        layers = {self._layer_of.get(source) for source in sources}
        if operation in (b"ADD", b"ADD_ID"):
            # A bias of the projection keeps the sum linear in it; the residual stream does not.
            others = [
                s for s in sources if s not in self._layer_of and not _DOWN_PROJECTION.search(name_of(s))
            ]
            layers.discard(None)
            return layers.pop() if len(layers) == 1 and not (operation == b"ADD" and others) else None
        if operation == b"MUL":
            layers.discard(None)  # the weight of an expert, or the gate of the shared one
            return layers.pop() if len(layers) == 1 else None
        return self._layer_of.get(sources[0]) if operation in _SHAPING else None


class BlockOutputs:
    """Finds the residual stream at the end of each block.

    It is the node that is called `l_out-N`, as in all but a few architectures, provided that the layers after
    N and the head take nothing from layer N that does not come through it.
    """

    def __init__(self, n_layer: int) -> None:
        self._n_layer = n_layer
        self._layer_of: dict[int, int] = {}
        self._sources: dict[int, list[int]] = {}
        self._handed_on: dict[int, set[int]] = {}
        self._called_output: dict[int, tuple[int, Node]] = {}
        self._latest: dict[bytes, int] = {}

    def visit(self, address: int, node: Node) -> None:
        """To be called with every node of a graph, in order."""
        sources = [self._original(source) for source in sources_of(address)]
        layers = [self._layer(source) for source in sources]
        layer = max(layers, default=-1)
        self._latest[node[0]] = address
        if layer < 0:
            return
        self._layer_of[address] = layer
        self._sources[address] = [s for s, below in zip(sources, layers, strict=True) if below >= 0]
        for source in sources:
            if self._layer_of.get(source, layer) < layer:
                self._handed_on.setdefault(self._layer_of[source], set()).add(source)
        match = _BLOCK_OUTPUT.fullmatch(node[0])
        if match and int(match[1]) == layer:
            self._called_output[layer] = (address, node)

    @property
    def of_layer(self) -> dict[int, Node]:
        return {
            layer: node
            for layer, (address, node) in self._called_output.items()
            if self._handed_on.get(layer)
            and all(self._comes_through(handed, address, layer) for handed in self._handed_on[layer])
        }

    def _layer(self, source: int) -> int:
        """The last layer whose weights went into a tensor; the head counts as one, inputs as -1."""
        if source in self._layer_of:
            return self._layer_of[source]
        name = name_of(source)
        if match := _WEIGHT_OF_LAYER.search(name):
            return int(match[1])
        return self._n_layer if _WEIGHT_OF_HEAD.search(name) and self._layer_of else -1

    def _comes_through(self, address: int, output: int, layer: int) -> bool:
        """Whether a node of a layer depends on weights through `output` alone."""
        if address == output:
            return True
        sources = self._sources[address] if self._layer_of.get(address) == layer else []
        return bool(sources) and all(self._comes_through(source, output, layer) for source in sources)

    def _original(self, source: int) -> int:
        copy = _COPY.fullmatch(name_of(source))
        return self._latest.get(copy[1], source) if copy else source


def operation_of(address: int) -> bytes:
    return bytes(ggml_base().ggml_op_desc(address))


def sources_of(address: int) -> list[int]:
    return [source for source in Tensor.from_address(address).src if source]
