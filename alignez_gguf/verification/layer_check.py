"""Checks that a layer, edited alone, computes what numpy says, and changes more than rounding does.

Everything before the layer is then bit for bit the unsteered model, so that what llama.cpp computes there can
be compared with numpy: the MLP output x against x + V^T G V x + b, and the residual stream h against h + a.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import Decision, LayerEdit, apply
from alignez_gguf.errors import SteeringError
from alignez_gguf.exporters.stock import scale_of_constants
from alignez_gguf.verification.rounding import EffectShare, RoundingFloor, logits_distance, median_and_worst

if TYPE_CHECKING:
    from alignez_gguf.runtime.layer_reader import Observation
    from alignez_gguf.verification.session import VerificationSession, Way

TOLERANCE = 0.05
"""Greatest distance of llama.cpp from numpy, and of the stock form from the patch, as a share of the edit. On
a CPU it is about 1e-6; a GPU may round the products of an edit differently from those of the weights."""

FLOOR = 0.5
"""Share of the change by an edit below which the change by rounding alone has to be."""


@dataclass(frozen=True)
class LayerCheck:
    """One edited layer, edited alone. All figures are taken token by token.

    Attributes:
        removed_before, removed_after: length of the MLP output along the directions that are removed or
            boosted, or else along what is added to it, of the middle token; `None` where the MLP output is
            not edited, or cannot be found in the graph.
        added_expected, added: length of the addition, and of what it changed at the end of the block, of the
            middle token; `None` where nothing is added, or (`added`) where that cannot be found.
        error, error_worst: how far the layer is from what numpy makes of it, as a share of the edit: of the
            middle token, and of the worst one. The larger one of removal and addition; `None` where neither
            can be seen.
        stock_error, stock_error_worst: the same through the stock form, where the edits reach llama.cpp
            through the patch; `None` elsewhere, and where there is no stock form.
        floor, floor_worst: what rounding alone changes as a share of what the edit changes, along the
            directions of the edit, or of the logits where they cannot be seen. The larger one of removal and
            addition; `None` where llama.cpp refuses the edit.
        acts: the logits change, the error, if it can be seen, is within `TOLERANCE`, and the floor is below
            `FLOOR`; the worst token decides nothing. A removal from an MLP output that cannot be found does
            not: branches that do not meet may each be edited, but nothing proves it.
        reason: why it does not act; empty where it does.
    """

    layer: int
    decision: Decision
    removed_before: float | None = None
    removed_after: float | None = None
    added_expected: float | None = None
    added: float | None = None
    error: float | None = None
    error_worst: float | None = None
    stock_error: float | None = None
    stock_error_worst: float | None = None
    floor: float | None = None
    floor_worst: float | None = None
    acts: bool = False
    reason: str = ""


def lost_in_rounding(floor: float) -> str:
    """Return the reason why an edit with this floor does not act."""
    return f"its effect is not above rounding, which alone changes {floor:.0%} of what the edit changes"


@dataclass(frozen=True, eq=False)
class LayerChecker:
    """Checks single layers of a model against what it computes without any edit.

    Attributes:
        session: runs the model.
        base_logits: float32 [n_tokens, n_vocab], the logits without an edit.
        base: the MLP and block outputs without an edit.
        floor: what rounding alone changes.
    """

    session: VerificationSession
    base_logits: NDArray[np.float32]
    base: Observation
    floor: RoundingFloor

    def check(self, way: Way, layer: int, edit: LayerEdit) -> LayerCheck:
        """Edit one layer alone, and compare what llama.cpp computes with numpy."""
        parts: list[_Part] = []
        try:
            if edit.edits_mlp:
                parts.append(self._part(way, layer, replace(edit, add=None)))
            if edit.add is not None:
                parts.append(self._part(way, layer, LayerEdit(add=edit.add)))
        except SteeringError as refusal:
            return LayerCheck(layer, edit.decision, reason=str(refusal))
        errors = [part.error for part in parts if part.error is not None]
        error, error_worst = median_and_worst(max(errors, key=_median, default=None))
        floor = max((part.floor for part in parts), key=_median)
        reason = ""
        if edit.edits_mlp and layer not in self.base.mlp:
            reason = "its MLP output cannot be found in the graph, so that nothing proves the edit"
        elif not all(part.changes for part in parts):
            reason = f"llama.cpp ignores it: {self.session.info.arch} models do not apply such an edit there"
        elif not floor.median < FLOOR:
            reason = lost_in_rounding(floor.median)
        elif error is not None and not error <= TOLERANCE:
            reason = f"llama.cpp computes something that is {error:.0%} of the edit away from it"
        lengths = {part.edit.edits_mlp: (part.before, part.after) for part in parts}
        (removed_before, removed_after), (expected, added) = (
            lengths.get(of_mlp, (None, None)) for of_mlp in (True, False)
        )
        return LayerCheck(
            layer,
            edit.decision,
            removed_before,
            removed_after,
            expected,
            added,
            error=error,
            error_worst=error_worst,
            floor=floor.median,
            floor_worst=floor.worst,
            acts=not reason,
            reason=reason,
        )

    def _part(self, way: Way, layer: int, edit: LayerEdit) -> _Part:
        """Compare an edit of the MLP output alone, or of the block output alone, with numpy."""
        with self.session.steered(way, {layer: edit}):
            logits, seen = self.session.observe()
        changes = not np.array_equal(logits, self.base_logits)
        if edit.edits_mlp:
            base, left, floor = self.base.mlp, self._edited_mlp_output(way, layer, edit, seen), self.floor.mlp
        else:
            base, left, floor = self.base.block, seen.block.get(layer), self.floor.block
        if layer not in base or left is None:  # the logits alone tell
            effect = logits_distance(logits, self.base_logits)
            return _Part(edit, changes, EffectShare.of(self.floor.logits, effect), before=edit.scale or None)
        x, rows = base[layer].astype(np.float64), _directions(edit)
        expected = apply(x, edit)
        changed = _lengths(expected - x)
        noise = floor.get(layer, np.zeros_like(x))
        before, after = (x @ rows.T, left @ rows.T) if edit.edits_mlp else (expected - x, left - x)
        return _Part(
            edit,
            changes,
            EffectShare.of(_lengths(noise @ rows.T), changed),
            EffectShare.of(_lengths(left - expected), changed),
            float(np.median(_lengths(before))),
            float(np.median(_lengths(after))),
        )

    def _edited_mlp_output(
        self, way: Way, layer: int, edit: LayerEdit, seen: Observation
    ) -> NDArray[np.float32] | None:
        """Return the edited MLP output.

        With stock llama.cpp, additions and removals from a bias show at the end of the block only.
        """
        biased = way == "stock" and (
            edit.bias is not None or any(down.bias for down in self.session.weights.down_projections(layer))
        )
        if not biased:
            return seen.mlp.get(layer)
        if layer in self.base.mlp and layer in self.base.block and layer in seen.block:
            moved = seen.block[layer] - self.base.block[layer]
            return self.base.mlp[layer] + moved / scale_of_constants(layer, self.session.weights)
        return None


@dataclass(frozen=True, eq=False)
class _Part:
    """The check of the edit of the MLP or block output alone; lengths are those of the middle token."""

    edit: LayerEdit
    changes: bool
    floor: EffectShare
    error: EffectShare | None = None
    before: float | None = None
    after: float | None = None


def _directions(edit: LayerEdit) -> NDArray[np.float32]:
    """Return the unit vectors [k, n_embd] along which the output changes."""
    if edit.remove is not None:
        return edit.remove
    vector = edit.add if edit.bias is None else edit.bias
    assert vector is not None
    return (vector[None] / edit.scale).astype(np.float32)


def _median(share: EffectShare) -> float:
    return share.median


def _lengths(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Return the length of each row."""
    result: NDArray[np.float64] = np.linalg.norm(rows.astype(np.float64), axis=-1)
    return result
