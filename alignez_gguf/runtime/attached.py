"""What sets the edits of a control on a context: the patch here, adapters of any llama.cpp in `stock`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from alignez_gguf.edits import Edits
from alignez_gguf.runtime import library


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
        library.set_strength(self._context, 0.0, control=control)
        if positions and strength > 0:
            library.set_strength(
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
        library.set_controls(self._context, [control._edits for control in nest])
        self._nest[:] = nest
        for control in nest:
            control.steer(control._strength, control._positions)
