"""The control files that a server knows by name, and how a request is steered if it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import check_strength
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.llama.sequences import UNSTEERED, SequenceSteering
from alignez_gguf.errors import SteeringError

NO_CONTROL = ""
"""The name of the control where there is no control file at all."""


@dataclass(frozen=True)
class SteeringChoice:
    """The control, strength and scope that a response is steered with.

    Attributes:
        control: the name of a control file, or `NO_CONTROL`.
    """

    control: str
    strength: float
    scope: Scope

    def document(self) -> dict[str, Any]:
        return {"control": self.control or None, "strength": self.strength, "scope": str(self.scope)}


class Controls:
    """Control files by name; the first one is the default.

    Args:
        files: checked against the model by the caller.
        strength: the default; where there are no files it is 0.
        scope: the default; `None`: the one that each control was chosen for.

    Raises:
        SteeringError: the strength or the scope is not valid.
    """

    def __init__(self, files: Mapping[str, ControlFile], strength: float, scope: str | None) -> None:
        self.files = dict(files)
        strength = check_strength(strength)
        self._control = next(iter(self.files), NO_CONTROL)
        self._strength = strength if files else 0.0
        self._scope = None if scope is None else Scope.parse(scope)

    def choose(
        self, strength: float | None = None, scope: str | None = None, control: str | None = None
    ) -> SteeringChoice:
        """Return the default, with each given value in place of its own.

        Raises:
            SteeringError: an unknown control or scope, or a strength without a control.
        """
        name = self._control if control is None else control
        if name not in (self.files or {NO_CONTROL}):
            known = ", ".join(self.files) or "none; start it with -c FILE"
            raise SteeringError(f"the server has no control {name!r}; it has {known}")
        chosen_strength = self._strength if strength is None else check_strength(strength)
        if chosen_strength and not self.files:
            raise SteeringError("the server has no control file to steer with; start it with -c FILE")
        chosen_scope = self._scope if scope is None else Scope.parse(scope)
        if chosen_scope is None:
            chosen_scope = self.files[name].scope if name in self.files else Scope()
        return SteeringChoice(name, chosen_strength, chosen_scope)

    def steering(self, choice: SteeringChoice, n_prompt: int) -> SequenceSteering:
        """Return the steering of a sequence with a prompt of `n_prompt` tokens."""
        if not choice.strength:
            return UNSTEERED
        first, end = choice.scope.positions(n_prompt)
        return SequenceSteering(choice.strength, first, end, list(self.files).index(choice.control))

    def gate(self, choice: SteeringChoice) -> Gate | None:
        """Return the gate that decides whether a request is steered; None without a gate or at strength 0."""
        return self.files[choice.control].gate if choice.strength else None

    def set_default(
        self, strength: float | None = None, scope: str | None = None, control: str | None = None
    ) -> None:
        """Change the default for requests to come; see `choose`."""
        chosen = self.choose(strength, scope, control)
        self._control, self._strength = chosen.control, chosen.strength
        if scope is not None:
            self._scope = chosen.scope

    def document(self) -> dict[str, Any]:
        """Return the default, and the edit of each layer by each control, as JSON can hold it."""
        return {
            **self.choose().document(),
            "controls": [
                {"name": name, "gate": file.gate is not None, "layers": _profile(file)}
                for name, file in self.files.items()
            ],
        }


def _profile(control: ControlFile) -> list[dict[str, Any]]:
    n_layer = control.model.n_layer or max(control.edits) + 1
    report = control.layers
    profile = []
    for layer in range(n_layer):
        edit = control.edits.get(layer)
        profile.append(
            {
                "layer": layer,
                "decision": "none" if edit is None else edit.decision,
                "rank": 0 if edit is None else edit.rank,
                "scale": 0.0 if edit is None else edit.scale,
                "accuracy": None if report is None else float(report.accuracy[layer]),
            }
        )
    return profile
