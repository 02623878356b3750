"""Copies the outputs of layers out of llama.cpp's graph while it computes, steered or not.

`reader` reads models that nobody steers. Here the nodes that an edit adds count as a part of the MLP output,
whether they come from the patch or from a LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.runtime.graph import F32, Tensor, copy_rows, name_of, operation_of, sources_of

_DOWN_PROJECTION = re.compile(rb"blk\.(\d+)\.ffn_down(?:_exps|_shexp|_chexps)?\.(?:weight|bias)")
_MODEL_WEIGHT = re.compile(rb"\.(?:weight|bias)$")
_BLOCK_OUTPUT = re.compile(rb"l_out-(\d+)")
_PRODUCTS = frozenset({b"MUL_MAT", b"MUL_MAT_ID", b"OUT_PROD"})
_SUMS = frozenset({b"ADD", b"ADD_ID", b"SUB"})
_LINEAR = frozenset(
    {b"SCALE", b"VIEW", b"RESHAPE", b"CONT", b"PERMUTE", b"TRANSPOSE", b"SUM_ROWS", b"REPEAT"}
)


@dataclass
class Observation:
    """What one decode computed, by layer; a layer that could not be told is missing.

    Attributes:
        mlp: the MLP output [n_tokens, n_embd], times the residual scale of architectures that have one.
        block: the residual stream at the end of the block, [n_tokens, n_embd].
    """

    mlp: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    block: dict[int, NDArray[np.float32]] = field(default_factory=dict)


class LayerObserver:
    """Watches decodes of `n_tokens` tokens of one sequence, all of which have logits.

    Attributes:
        on_node: to be given to the `Context` that decodes. Costs little outside `observe`.
    """

    def __init__(self, n_tokens: int, n_embd: int) -> None:
        self._shape = (n_tokens, n_embd)
        self._observation: Observation | None = None
        self._layer_of: dict[int, int] = {}
        self._target: tuple[dict[int, NDArray[np.float32]], int] | None = None
        self._error: BaseException | None = None
        self.on_node: Any = llama.ggml_backend_sched_eval_callback(self._safely_visit)

    def observe(self, decode: Callable[[], None]) -> Observation:
        """What `decode` computes."""
        observation = self._observation = Observation()
        self._layer_of.clear()
        try:
            decode()
        finally:
            self._observation = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return observation

    def _safely_visit(self, tensor: int, ask: bool, _: object) -> bool:
        """ctypes would print an exception and go on; keep it for the caller instead."""
        if self._observation is None:
            return False
        try:
            return self._is_wanted(tensor, self._observation) if ask else self._copy(tensor)
        except BaseException as error:
            self._observation = None
            self._error = error
            return False

    def _is_wanted(self, address: int, observation: Observation) -> bool:
        """llama.cpp asks of each node, in order, whether it is wanted, and shows those that are, computed.

        Every node that is linear in a down projection may be the last such node of its layer, so each is
        copied, in place of the one before it.
        """
        layer = self._linear_in_down_projection_of(address)
        if layer is not None:
            self._layer_of[address] = layer
            self._target = observation.mlp, layer
        elif match := _BLOCK_OUTPUT.fullmatch(name_of(address)):
            self._target = observation.block, int(match[1])
        else:
            return False
        tensor = Tensor.from_address(address)
        return (
            tensor.type == F32
            and (tensor.ne[1], tensor.ne[0]) == self._shape
            and tensor.ne[2] * tensor.ne[3] == 1
            and tensor.nb[0] == 4
        )

    def _copy(self, address: int) -> bool:
        assert self._target is not None
        place, layer = self._target
        place[layer] = np.empty(self._shape, np.float32)
        copy_rows(address, place[layer])
        return True

    def _linear_in_down_projection_of(self, address: int) -> int | None:
        inputs = sources_of(address)
        if not inputs:
            return None
        kind = operation_of(address)
        layers = [self._layer_of.get(source) for source in inputs]
        if kind in _PRODUCTS:
            name = name_of(inputs[0])
            if match := _DOWN_PROJECTION.search(name):
                return int(match[1])
            return None if _MODEL_WEIGHT.search(name) else layers[1]
        known = {layer for layer in layers if layer is not None}
        if len(known) != 1:
            return None
        if kind in _SUMS:
            # A bias of the projection keeps the sum linear in it; the residual stream does not.
            others = [s for s, layer in zip(inputs, layers, strict=True) if layer is None]
            if kind == b"ADD_ID":
                others = others[:-1]  # which expert each token goes to
            return known.pop() if all(_DOWN_PROJECTION.search(name_of(s)) for s in others) else None
        if kind == b"MUL" or (kind in _LINEAR and layers[0] is not None):
            return known.pop()
        return None
