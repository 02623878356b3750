"""Reads the outputs of every layer out of llama.cpp's graph while it computes, steered or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import ModelFileError
from alignez_gguf.readout import Hook, Readout
from alignez_gguf.runtime.graph import BlockOutputs, MlpOutputs, copy_rows, count_rows, name_of

_CALLED: dict[Hook, str] = {"mlp": "MLP output", "residual": "residual stream at the end"}
_MAX_FLOAT16 = float(np.finfo(np.float16).max)

_Node = tuple[bytes, int]
"""A node that can be found again in the next graph: its name, and how many before it have the same."""


@dataclass
class Observation:
    """The hidden states of one decode, by layer; a layer that could not be identified is missing.

    Attributes:
        mlp: the MLP output, with what edits it, [n_tokens, n_embd].
        block: what llama.cpp calls the output of the block, [n_tokens, n_embd].
    """

    mlp: dict[int, NDArray[np.float32]]
    block: dict[int, NDArray[np.float32]]


class LayerReader:
    """Takes the outputs of all layers: of every token of a decode, or of the last ones of many decodes.

    `observe` copies all that one decode computes. `learn` is the same without the copies: it shows where the
    outputs are. Then a text is read, for less, inside `reading`, by `arm` before each decode that has tokens
    to be read, and `take` after the last: the last token, or the mean.

    Args:
        info: of the model that decodes.

    Attributes:
        on_node: to be given to the `Context` that decodes. Costs little while nothing is read.
    """

    def __init__(self, info: ModelInfo) -> None:
        self._architecture = info.arch
        self._shape = (info.n_layer, info.n_embd)
        self._found: dict[Hook, dict[int, _Node]] | None = None
        self._finders: tuple[MlpOutputs, BlockOutputs] | None = None
        """While a graph is observed."""
        self._nodes: dict[int, _Node] = {}
        self._copies: dict[int, NDArray[np.float32]] = {}
        self._n_observed = 0
        self._readouts: Sequence[Readout] = ()
        self._wanted: dict[_Node, tuple[Hook, int]] = {}
        self._sums: dict[Hook, NDArray[np.float32]] = {}
        self._last: dict[Hook, NDArray[np.float32]] = {}
        self._n_summed = 0
        self._rows = np.empty((2, info.n_embd), np.float32)
        self._armed = False
        self._seen: dict[bytes, int] = {}
        self._shown: tuple[Hook, int] = ("mlp", -1)
        self._missing: set[tuple[Hook, int]] = set()
        self._error: BaseException | None = None
        self.on_node: Any = llama.ggml_backend_sched_eval_callback(self._safely_visit)

    @property
    def knows_graph(self) -> bool:
        """Whether a first decode has shown where the outputs are; until then nothing can be read."""
        return self._found is not None

    @property
    def hooks(self) -> set[Hook]:
        """The hidden states that were found in every layer."""
        layers = set(range(self._shape[0]))
        return {hook for hook, of_layer in (self._found or {}).items() if of_layer.keys() == layers}

    def learn(self, decode: Callable[[], object]) -> None:
        """Learn where the outputs are from what `decode` computes: one sequence, in one batch."""
        self.observe(decode, 0)

    def observe(self, decode: Callable[[], object], n_tokens: int) -> Observation:
        """Copy the hidden states of `n_tokens` tokens of one sequence, in one batch; all must have logits.

        Args:
            decode: computes the batch.
            n_tokens: the number of its tokens; 0 copies nothing.
        """
        mlp, block = self._finders = MlpOutputs(self._shape[1]), BlockOutputs(self._shape[0])
        self._n_observed = n_tokens
        self._nodes, self._copies, self._seen = {}, {}, {}
        self._armed = True
        try:
            decode()
        finally:
            self._armed, self._finders = False, None
        self._disarm()
        outputs: dict[Hook, dict[int, int]] = {"mlp": mlp.of_layer, "residual": block.of_layer}
        self._found = {
            hook: {layer: self._nodes[address] for layer, address in of_layer.items()}
            for hook, of_layer in outputs.items()
        }
        return Observation(self._copied(outputs["mlp"]), self._copied(block.called_output))

    def _copied(self, addresses: Mapping[int, int]) -> dict[int, NDArray[np.float32]]:
        return {layer: self._copies[at] for layer, at in addresses.items() if at in self._copies}

    @contextmanager
    def reading(self, readouts: Sequence[Readout]) -> Iterator[None]:
        """Inside, read these hidden states of the tokens that `arm` names.

        Raises:
            ModelFileError: a layer has no such output that can be identified with certainty.
        """
        hooks = {readout.hook for readout in readouts}
        self._wanted = {node: (hook, layer) for hook in hooks for layer, node in self._outputs(hook).items()}
        self._readouts = readouts
        self._sums = {readout.hook: self._zeros() for readout in readouts if readout.pooling == "mean"}
        self._last = {hook: self._zeros() for hook in hooks}
        self._n_summed = 0
        try:
            yield
        finally:
            self._armed, self._missing, self._error = False, set(), None

    def arm(self, n_tokens: int) -> None:
        """Read the last `n_tokens` of the next decode, which must be one of a single sequence.

        They must be the tokens with logits: in the last layer no others are left. The logits themselves are
        not computed, since llama.cpp stops after the last output.
        """
        self._disarm()
        self._rows = np.empty((1 + n_tokens, self._shape[1]), np.float32)
        self._n_summed += n_tokens
        self._missing = set(self._wanted.values())
        self._seen = {}
        self._armed = True

    def take(self) -> NDArray[np.float16]:
        """Return the hidden states that were read, [n_readouts, n_layer, n_embd]."""
        self._disarm()
        states = np.stack(
            [
                self._last[readout.hook]
                if readout.pooling == "last"
                else self._sums[readout.hook] / self._n_summed
                for readout in self._readouts
            ]
        )
        # Massive activations of some models exceed float16.
        return np.asarray(np.clip(states, -_MAX_FLOAT16, _MAX_FLOAT16), np.float16)

    def _outputs(self, hook: Hook) -> dict[int, _Node]:
        """The outputs of all layers."""
        found = (self._found or {}).get(hook, {})
        if hook not in self.hooks:
            n_layer = self._shape[0]
            missing = min(set(range(n_layer)) - found.keys(), default=n_layer)
            instead = [f"read elsewhere (--hook {other})" for other in self.hooks]
            raise ModelFileError(
                f"the {_CALLED[hook]} of layer {missing} cannot be found in the graph of the architecture "
                f"{self._architecture!r}; {' or '.join([*instead, 'use a model of another architecture'])}"
            )
        return found

    def _zeros(self) -> NDArray[np.float32]:
        return np.zeros(self._shape, np.float32)

    def _disarm(self) -> None:
        self._armed = False
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self._missing:
            raise RuntimeError(f"{len(self._missing)} outputs of layers have not been computed")

    def _safely_visit(self, tensor: int, ask: bool, _: object) -> bool:
        """ctypes would print an exception and go on; keep it for the caller instead."""
        if not self._armed:
            return False
        try:
            return self._is_wanted(tensor) if ask else self._read(tensor)
        except BaseException as error:
            self._armed = False
            self._missing = set()
            self._error = error
            return False

    def _is_wanted(self, tensor: int) -> bool:
        """llama.cpp asks of each node, in order, whether it is wanted.

        While a graph is observed, every linear node may be the end of its layer, so each is copied.
        """
        name = name_of(tensor)
        node = name, self._seen.get(name, 0)
        self._seen[name] = node[1] + 1
        if self._finders is not None:
            self._nodes[tensor] = node
            mlp, block = self._finders
            is_linear, is_block = mlp.visit(tensor), block.visit(tensor)
            return (is_linear or is_block) and count_rows(tensor, self._shape[1]) == self._n_observed > 0
        wanted = self._wanted.get(node)
        if wanted is None:
            return False
        self._shown = wanted
        return True

    def _read(self, address: int) -> bool:
        """Read a wanted node once it is computed; llama.cpp goes on if this returns True."""
        if self._finders is not None:
            rows = self._copies[address] = np.empty((self._n_observed, self._shape[1]), np.float32)
            copy_rows(address, rows)
            return True
        hook, layer = self._shown
        if count_rows(address, self._shape[1]) < len(self._rows) - 1:
            raise ModelFileError(
                f"the {_CALLED[hook]} of {self._architecture!r} has an unexpected shape or type"
            )
        sums = self._sums.get(hook)
        rows = self._rows if sums is not None else self._rows[-2:]
        copy_rows(address, rows[1:])
        self._last[hook][layer] = rows[-1]
        if sums is not None:
            # One row after the other, so that the sum does not depend on where a decode begins.
            rows[0] = sums[layer]
            rows.sum(axis=0, out=sums[layer])
        self._missing.discard(self._shown)
        self._armed = bool(self._missing)
        return self._armed
