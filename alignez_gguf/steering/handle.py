"""The part that the handles of `steer` and `steer_transformers` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import check_strength
from alignez_gguf.control.scope import Scope

if TYPE_CHECKING:
    from typing_extensions import Self


class ControlState:
    """The strength and the scope of a control on a model, which can change while it steers."""

    def __init__(self, strength: float, scope: Scope) -> None:
        self.strength = strength
        self.scope = scope


class SteeringHandle(ABC):
    """A control on a model. Leaving the `with` block, or `remove()`, gives the model back without it.

    Args:
        control: the control file that steers.
        state: its strength and scope at first.
    """

    def __init__(self, control: ControlFile, state: ControlState) -> None:
        self.control = control
        self._state = state

    @property
    def strength(self) -> float:
        """The factor of the edit, 0 or more; a change holds from the next forward pass on."""
        return self._state.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._require_attached()
        self._state.strength = check_strength(value)
        self._apply_strength()

    @property
    def scope(self) -> Scope:
        """The tokens that are steered; a change holds from the next prompt on."""
        return self._state.scope

    @scope.setter
    def scope(self, value: str | Scope) -> None:
        self._require_attached()
        self._state.scope = Scope.parse(value)

    @abstractmethod
    def remove(self) -> None:
        """Give the model back without this control. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @abstractmethod
    def _require_attached(self) -> None:
        """Raise `SteeringError` where the control no longer steers the model."""

    @abstractmethod
    def _apply_strength(self) -> None:
        """Let a changed strength act on the request that is under way."""
