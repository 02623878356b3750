"""The ways to set the edits of a control on a context: the patch here, adapters in `stock_adapters`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.errors import AlignezError, SteeringError
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.runtime import bindings


class SteeringBackend(Protocol):
    """Edits that are set on a context."""

    def steer(self, strength: float, positions: range) -> None:
        """Steer the tokens at these positions of sequence 0, and no others, from the next decode on."""
        ...

    def split_batch(self, first: int, n_tokens: int) -> Iterable[int]:
        """Cut the next tokens, from position `first` on, into what may be decoded at once.

        Gives the number of tokens of each part, which has to be decoded before the next one is asked for.
        """
        ...

    def detach(self) -> None:
        """Leave the context as it was."""
        ...


class Patched:
    """The edits of a control as the patch takes them, with a strength for each token.

    Args:
        context: the `llama_context *`.
        edits: of this control.
        beside: a control of the context, after which and after whose others this one acts. Without, nothing
            else may edit the context.

    Raises:
        SteeringError: llama.cpp cannot edit the model there.
        RuntimeUnavailableError: the patch is missing.
    """

    def __init__(self, context: Any, edits: Edits, *, beside: Patched | None = None) -> None:
        self._context = context
        self._edits = edits
        self._nest: list[Patched] = [] if beside is None else beside._nest
        """All controls of the context, in the order in which they act."""
        self._strength = 0.0
        self._positions = range(0)
        self._set([*self._nest, self])

    def steer(self, strength: float, positions: range) -> None:
        self._strength, self._positions = strength, positions
        control = self._nest.index(self)
        bindings.set_strength(self._context, 0.0, control=control)
        if positions and strength > 0:
            bindings.set_strength(
                self._context,
                strength,
                control=control,
                sequence=0,
                first=positions.start,
                end=positions.stop,
            )

    def split_batch(self, first: int, n_tokens: int) -> Iterable[int]:
        return (n_tokens,)

    def detach(self) -> None:
        self._set([control for control in self._nest if control is not self])

    def _set(self, nest: list[Patched]) -> None:
        bindings.set_controls(self._context, [control._edits for control in nest])
        self._nest[:] = nest
        for control in nest:
            control.steer(control._strength, control._positions)


@dataclass(frozen=True)
class SteeringSupport:
    """Whether and how `steer` can steer a model.

    Attributes:
        steers: the way that `steer` takes: the patch, the adapters of stock llama.cpp, or none.
        reason: why not the way before it; empty for the patch.
    """

    steers: Literal["patched", "stock", "no"]
    reason: str = ""


def steering_support(path: Path) -> SteeringSupport:
    """Try to edit every layer of a model, without computing anything.

    Raises:
        ModelFileError: the model cannot be loaded.
        RuntimeUnavailableError: there is no llama.cpp.
    """
    reason = "the patch is missing"
    if bindings.is_patched():
        reason = _why_not_patched(path)
        if not reason:
            return SteeringSupport("patched")
    try:
        weights = ModelWeights(path)
        for layer in range(weights.info.n_layer):
            for down in weights.down_projections(layer):
                down.weight.dequantised(0, 1)
    except AlignezError as error:
        return SteeringSupport("no", f"{reason}; {error}")
    return SteeringSupport("stock", reason)


def _why_not_patched(path: Path) -> str:
    """Return why the patch does not reach every layer; empty where it does."""
    from alignez_gguf.runtime.context import Context
    from alignez_gguf.runtime.model import Model

    with Model(path, n_gpu_layers=0) as model:
        edit = LayerEdit(remove=np.eye(1, model.info.n_embd, dtype=np.float32))
        try:
            Context(model, n_ctx=16, edits=dict.fromkeys(range(model.info.n_layer), edit)).close()
        except SteeringError as out_of_reach:
            return str(out_of_reach)
    return ""
