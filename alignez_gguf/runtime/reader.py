"""Reads the outputs of every layer out of llama.cpp's graph while it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.engines import Hook, Readout
from alignez_gguf.errors import ModelFileError
from alignez_gguf.runtime.graph import F32, BlockOutputs, MlpOutputs, Node, Tensor, copy_rows, name_of

_CALLED: dict[Hook, str] = {"mlp": "MLP output", "residual": "residual stream at the end"}
_MAX_FLOAT16 = float(np.finfo(np.float16).max)


class LayerReader:
    """Takes the outputs of all layers for the last tokens of decodes: the last one, or their mean.

    A first decode shows where the outputs are: `watch` before it, `learn` after it. Then a text is read
    inside `reading`, by `arm` before each decode that has tokens to be read, and `take` after the last.

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
        self._found: dict[Hook, dict[int, Node]] | None = None
        self._finders: dict[Hook, MlpOutputs | BlockOutputs] = {}
        self._readouts: Sequence[Readout] = ()
        self._wanted: dict[Node, tuple[Hook, int]] = {}
        self._sums: dict[Hook, NDArray[np.float32]] = {}
        self._last: dict[Hook, NDArray[np.float32]] = {}
        self._n_summed = 0
        self._rows = np.empty((2, n_embd), np.float32)
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
        """What has been found of every layer."""
        layers = set(range(self._shape[0]))
        return {hook for hook, of_layer in (self._found or {}).items() if of_layer.keys() == layers}

    def watch(self) -> None:
        """Look at the next decode. It must be one of a single sequence, with logits for its last token."""
        self._finders = {"mlp": MlpOutputs(self._shape[1]), "residual": BlockOutputs(self._shape[0])}
        self._seen.clear()
        self._armed = True

    def learn(self) -> None:
        """After the watched decode: fix which nodes are the outputs."""
        self._disarm()
        self._found = {hook: finder.of_layer for hook, finder in self._finders.items()}
        self._finders = {}

    @contextmanager
    def reading(self, readouts: Sequence[Readout]) -> Iterator[None]:
        """Inside, this is read of the tokens that `arm` names.

        Raises:
            ModelFileError: a layer has no such output that can be told with certainty.
        """
        hooks = {readout.hook for readout in readouts}
        self._wanted = {node: (hook, layer) for hook in hooks for layer, node in self._nodes(hook).items()}
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
        self._seen.clear()
        self._armed = True

    def take(self) -> NDArray[np.float16]:
        """What was read, [n_readouts, n_layer, n_embd]."""
        self._disarm()
        found = np.stack(
            [
                self._last[readout.hook]
                if readout.pooling == "last"
                else self._sums[readout.hook] / self._n_summed
                for readout in self._readouts
            ]
        )
        # Massive activations of some models exceed float16.
        return np.asarray(np.clip(found, -_MAX_FLOAT16, _MAX_FLOAT16), np.float16)

    def _nodes(self, hook: Hook) -> dict[int, Node]:
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
        """llama.cpp asks of each node, in order, whether it is wanted."""
        name = name_of(tensor)
        occurrence = self._seen.get(name, 0)
        self._seen[name] = occurrence + 1
        for finder in self._finders.values():
            finder.visit(tensor, (name, occurrence))
        wanted = None if self._finders else self._wanted.get((name, occurrence))
        if wanted is None:
            return False
        self._shown = wanted
        return True

    def _read(self, address: int) -> bool:
        """It shows those that are, computed, and goes on if this returns True."""
        tensor = Tensor.from_address(address)
        hook, layer = self._shown
        n_tokens, n_embd = len(self._rows) - 1, self._shape[1]
        if (
            tensor.type != F32
            or tensor.ne[0] != n_embd
            or tensor.ne[1] < n_tokens
            or tensor.nb[0] != 4
            or tensor.ne[2] * tensor.ne[3] != 1
        ):
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
