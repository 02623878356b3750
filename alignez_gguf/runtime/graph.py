"""Which nodes of llama.cpp's graph are the outputs of a layer, decided while the graph is computed.

Nodes are told by what computes them, so this holds for any architecture that names its weights in the usual
way, steered or not. Where something cannot be told with certainty it is not found.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

from numpy.typing import NDArray

from alignez_gguf.runtime.bindings import ggml_base

_F32 = 0  # GGML_TYPE_F32

_WEIGHT_OF_LAYER = re.compile(rb"blk\.(\d+)\.")
_WEIGHT_OF_HEAD = re.compile(rb"(?:^|#)(?:output|token_embd)[^#]*\.(?:weight|bias)")
_DOWN_PROJECTION = re.compile(rb"blk\.(\d+)\.ffn_down(?:_exps|_shexp|_chexps)?\.(?:weight|bias)")
_BLOCK_OUTPUT = re.compile(rb"l_out-(\d+)")
_COPY = re.compile(rb"[^#]+#(.+)#\d+")
"""The name of a copy of a node for another device (ggml_backend_sched_split_graph)."""

_EDIT = re.compile(rb"(?:[^#]+#)?leaf_\d+(?:#\d+)?")
"""The name of a tensor that has neither sources nor a name of its own, as U, V and b of the patch. The
weights and inputs of a model have names, and those of a LoRA begin with the name of the weight."""
_PRODUCTS = frozenset({b"MUL_MAT", b"MUL_MAT_ID"})
_SUMS = frozenset({b"ADD", b"ADD_ID", b"SUB"})
_LINEAR = frozenset(
    {b"SCALE", b"VIEW", b"RESHAPE", b"CONT", b"PERMUTE", b"TRANSPOSE", b"SUM_ROWS", b"REPEAT"}
)


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


def count_rows(address: int, width: int) -> int:
    """The number of rows of an F32 matrix of this width; 0 for any other tensor."""
    tensor = Tensor.from_address(address)
    is_matrix = tensor.type == _F32 and tensor.nb[0] == 4 and tensor.ne[2] * tensor.ne[3] == 1
    return int(tensor.ne[1]) if is_matrix and tensor.ne[0] == width else 0


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
    """Finds the MLP outputs, as the patch or a LoRA edits them.

    The nodes that are linear in the down projections of a layer (`blk.N.ffn_down`, and of a mixture `_exps`,
    `_shexp` and `_chexps`) end in its MLP output, which the residual add uses, or a norm after the MLP. What
    an edit adds to it counts, and the residual scale of architectures that have one does not. Branches that
    meet in no linear node have an end each, and none of them is the MLP output; such a layer is not found,
    nor is one that ends in another width, as that of experts in a latent space.

    Args:
        n_embd: the width of the residual stream.
    """

    def __init__(self, n_embd: int) -> None:
        self._n_embd = n_embd
        self._layer_of: dict[int, int] = {}
        """The linear nodes."""
        self._wide: set[int] = set()
        """Nodes of the width of the residual stream."""
        self._within: set[int] = set()
        """Nodes that another linear node uses."""
        self._beyond: set[int] = set()
        """Nodes that others use."""
        self._unscaled: dict[int, int] = {}
        self._biases: set[int] = set()
        """The nodes that the biases of edits add to each token."""

    def visit(self, address: int) -> bool:
        """Take the next node of a graph, in order, and return whether it is a linear one."""
        layer = self._layer(address)
        sources = [source for source in sources_of(address) if source in self._layer_of]
        (self._beyond if layer is None else self._within).update(sources)
        if layer is None:
            return False
        self._layer_of[address] = layer
        if Tensor.from_address(address).ne[0] == self._n_embd:
            self._wide.add(address)
        if operation_of(address) == b"SCALE":
            self._unscaled[address] = sources[0]
        return True

    @property
    def of_layer(self) -> dict[int, int]:
        """The address of the MLP output, by layer."""
        ends: dict[int, list[int]] = {}
        for address, layer in self._layer_of.items():
            if address not in self._within or address in self._beyond:
                ends.setdefault(layer, []).append(address)
        return {
            layer: self._before_scale(of_layer[0])
            for layer, of_layer in ends.items()
            if len(of_layer) == 1 and of_layer[0] in self._wide
        }

    def _before_scale(self, address: int) -> int:
        while address in self._unscaled:
            address = self._unscaled[address]
        return address

    def _layer(self, address: int) -> int | None:
        sources = sources_of(address)
        operation = operation_of(address)
        layers = [self._layer_of.get(source) for source in sources]
        if operation in _PRODUCTS:
            weight = name_of(sources[0])
            if match := _DOWN_PROJECTION.search(weight):
                return int(match[1])
            if not _EDIT.fullmatch(weight):
                return None
            if layers[1] is None:
                self._biases.add(address)
            return layers[1]
        known = {layer for layer in layers if layer is not None}
        if len(known) != 1:
            return None
        if operation in _SUMS:
            # A bias keeps the sum linear; the residual stream does not.
            others = [source for source, layer in zip(sources, layers, strict=True) if layer is None]
            if operation == b"ADD_ID":
                others = others[:-1]  # which expert each token goes to
            are_biases = all(s in self._biases or _DOWN_PROJECTION.search(name_of(s)) for s in others)
            return known.pop() if are_biases else None
        # A factor is the weight of an expert, or the gate of the shared one.
        return (
            known.pop() if operation == b"MUL" or (operation in _LINEAR and layers[0] is not None) else None
        )


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
        self.called_output: dict[int, int] = {}
        """The address of the node with the name, by layer, whatever bypasses it."""
        self._latest: dict[bytes, int] = {}

    def visit(self, address: int) -> bool:
        """Take the next node of a graph, in order, and return whether its name is that of an output."""
        name = name_of(address)
        sources = [self._original(source) for source in sources_of(address)]
        layers = [self._layer(source) for source in sources]
        layer = max(layers, default=-1)
        self._latest[name] = address
        if layer < 0:
            return False
        self._layer_of[address] = layer
        self._sources[address] = [s for s, below in zip(sources, layers, strict=True) if below >= 0]
        for source in sources:
            if self._layer_of.get(source, layer) < layer:
                self._handed_on.setdefault(self._layer_of[source], set()).add(source)
        match = _BLOCK_OUTPUT.fullmatch(name)
        if not match or int(match[1]) != layer:
            return False
        self.called_output[layer] = address
        return True

    @property
    def of_layer(self) -> dict[int, int]:
        """The address of the residual stream, by layer."""
        return {
            layer: address
            for layer, address in self.called_output.items()
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
