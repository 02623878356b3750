"""Copies the outputs of layers out of llama.cpp's graph while it computes, steered or not.

`reader` reads models that nobody steers. Here the nodes that an edit adds count as a part of the MLP output,
whether they come from the patch or from a LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.runtime.graph import F32, MlpOutputs, Tensor, copy_rows, name_of

_BLOCK_OUTPUT = re.compile(rb"l_out-(\d+)")


@dataclass
class Observation:
    """What one decode computed, by layer; a layer that could not be told is missing.

    Attributes:
        mlp: the MLP output [n_tokens, n_embd], times the residual scale of architectures that have one.
        block: the residual stream at the end of the block, [n_tokens, n_embd].
    """

    mlp: dict[int, NDArray[np.float32]]
    block: dict[int, NDArray[np.float32]]


class LayerObserver:
    """Watches decodes of `n_tokens` tokens of one sequence, all of which have logits.

    Attributes:
        on_node: to be given to the `Context` that decodes. Costs little outside `observe`.
    """

    def __init__(self, n_tokens: int, n_embd: int) -> None:
        self._shape = (n_tokens, n_embd)
        self._finder: MlpOutputs | None = None
        self._copies: dict[int, NDArray[np.float32]] = {}
        self._blocks: dict[int, int] = {}
        self._error: BaseException | None = None
        self.on_node: Any = llama.ggml_backend_sched_eval_callback(self._safely_visit)

    def observe(self, decode: Callable[[], None]) -> Observation:
        """What `decode` computes."""
        finder = self._finder = MlpOutputs(self._shape[1], steered=True)
        self._copies, self._blocks = {}, {}
        try:
            decode()
        finally:
            self._finder = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return Observation(self._copied(finder.addresses), self._copied(self._blocks))

    def _copied(self, addresses: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        return {layer: self._copies[at] for layer, at in addresses.items() if at in self._copies}

    def _safely_visit(self, tensor: int, ask: bool, _: object) -> bool:
        """ctypes would print an exception and go on; keep it for the caller instead."""
        if self._finder is None:
            return False
        try:
            return self._is_wanted(tensor, self._finder) if ask else self._copy(tensor)
        except BaseException as error:
            self._finder = None
            self._error = error
            return False

    def _is_wanted(self, address: int, finder: MlpOutputs) -> bool:
        """llama.cpp asks of each node, in order, whether it is wanted, and shows those that are, computed.

        Every linear node may be the end of its layer, so each is copied.
        """
        name = name_of(address)
        linear = finder.visit(address, (name, 0))
        block = _BLOCK_OUTPUT.fullmatch(name)
        if block:
            self._blocks[int(block[1])] = address
        tensor = Tensor.from_address(address)
        return bool(
            (linear or block)
            and tensor.type == F32
            and (tensor.ne[1], tensor.ne[0]) == self._shape
            and tensor.ne[2] * tensor.ne[3] == 1
            and tensor.nb[0] == 4
        )

    def _copy(self, address: int) -> bool:
        rows = self._copies[address] = np.empty(self._shape, np.float32)
        copy_rows(address, rows)
        return True
