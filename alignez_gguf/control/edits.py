"""Defines the edit of a layer, and turns directions into edits.

Pure numpy, no I/O: this module knows nothing of files, models or engines. `apply` is the readable
definition of an edit; the runtime and the exporters are held against it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignez_gguf.errors import SteeringError

if TYPE_CHECKING:
    from alignez_gguf.control.gate import Gate
    from alignez_gguf.directions.base import Directions

Decision = Literal["none", "remove", "add", "remove+add", "boost", "boost+add"]
"""The kind of change that an edit makes to a layer: with gains other than -1 it is a boost."""

ORTHONORMAL_TOLERANCE = 1e-5
"""Rows whose Gram matrix is within this of the identity count as orthonormal and are kept as they are."""

_DEPENDENT = 1e-5
"""A row that keeps less than this share of its length outside the rows before it is dependent on them."""


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """The edit of one layer, for strength 1.

    The output x of the MLP becomes x + V^T G V x + b, and the output h of the block h + a. The arrays are
    copied, float32 and read-only. An addition of zeros is no addition (`None`), and so is a gain of -1.

    Attributes:
        add: a, [n_embd], added to the output of the block (after the residual addition).
        remove: V, [k, n_embd] with orthonormal rows. May be given as [n_embd], and without a gain as any
            [k, n_embd]: it is orthonormalised in the order of its rows, and rows that depend on earlier ones
            are dropped.
        gain: the diagonal of G, [k]: the component along a row is multiplied by 1 + gain. None is -1 for
            all: they are removed. A gain above 0 boosts.
        bias: b, [n_embd], added to the output of the MLP.

    Raises:
        SteeringError: a wrong shape, a value that is not finite, a `remove` of rank 0, or a gain for rows
            that are not orthonormal.
    """

    add: NDArray[np.float32] | None = None
    remove: NDArray[np.float32] | None = None
    gain: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        remove = None if self.remove is None else np.atleast_2d(_finite("remove", self.remove))
        if remove is not None and (remove.ndim != 2 or remove.size == 0):
            raise SteeringError(
                f"`remove` must have the shape [n_embd] or [k, n_embd], not {list(remove.shape)}"
            )
        gain = None if self.gain is None else np.atleast_1d(_finite("gain", self.gain))
        if gain is not None:
            if remove is None or gain.shape != remove.shape[:1]:
                raise SteeringError("`gain` must have one number for each row of `remove`")
            if len(gain) > 1 and not is_orthonormal(remove):
                raise SteeringError("a `gain` needs a `remove` whose rows are orthonormal")
        added = {}
        for name in ("add", "bias"):
            value = getattr(self, name)
            vector = None if value is None else _finite(name, value)
            if vector is not None and (vector.ndim != 1 or vector.size == 0):
                raise SteeringError(f"`{name}` must have the shape [n_embd], not {list(vector.shape)}")
            if vector is not None and remove is not None and vector.shape[0] != remove.shape[1]:
                raise SteeringError(
                    f"`{name}` has width {vector.shape[0]} and `remove` {remove.shape[1]}; both must be "
                    "n_embd"
                )
            added[name] = _frozen(vector) if vector is not None and vector.any() else None
        if len({vector.shape for vector in added.values() if vector is not None}) > 1:
            raise SteeringError("`add` and `bias` must both have the width n_embd")
        object.__setattr__(self, "remove", _frozen(orthonormal_rows(remove)) if remove is not None else None)
        object.__setattr__(self, "gain", _frozen(gain) if gain is not None and (gain != -1).any() else None)
        for name, vector in added.items():
            object.__setattr__(self, name, vector)

    @classmethod
    def about(cls, directions: ArrayLike, center: ArrayLike, gain: float = -1.0) -> LayerEdit:
        """Return the edit x + gain V^T V (x - center).

        It removes (gain -1) or boosts the part of x - center along the directions.

        Args:
            directions: [n_embd] or [k, n_embd], of any length and angle; V spans the same.
            center: [n_embd], an MLP output that stays as it is.
            gain: the gain of every direction.

        Raises:
            SteeringError: as `LayerEdit`.
        """
        v = orthonormal_rows(np.atleast_2d(_finite("directions", directions)))
        middle = _finite("center", center)
        if middle.shape != v.shape[1:]:
            raise SteeringError(f"`center` must have the shape [{v.shape[1]}], not {list(middle.shape)}")
        exact = v.astype(np.float64)
        bias = -gain * (exact @ middle) @ exact
        return cls(remove=v, gain=np.full(len(v), gain, np.float32), bias=bias.astype(np.float32))

    @property
    def gains(self) -> NDArray[np.float32]:
        """The gain of every row of `remove`, float32 [k]; -1 where it is removed."""
        return np.full(self.rank, -1, np.float32) if self.gain is None else self.gain

    @property
    def edits_mlp(self) -> bool:
        """Whether the edit changes the output of the MLP, and not that of the block alone."""
        return self.remove is not None or self.bias is not None

    @property
    def decision(self) -> Decision:
        adds = self.add is not None or self.bias is not None
        if self.remove is None:
            return "add" if adds else "none"
        if self.gain is None:
            return "remove+add" if adds else "remove"
        return "boost+add" if adds else "boost"

    @property
    def rank(self) -> int:
        """The number of directions that are removed or boosted."""
        return 0 if self.remove is None else int(self.remove.shape[0])

    @property
    def n_embd(self) -> int | None:
        """The length of the vectors; None for the edit that does nothing."""
        arrays = [array for array in (self.remove, self.bias, self.add) if array is not None]
        return int(arrays[0].shape[-1]) if arrays else None

    @property
    def scale(self) -> float:
        """The length of what is added at strength 1, to the MLP and to the block."""
        # In float64: the squares of large values leave the range of float32.
        added = [vector.astype(np.float64) for vector in (self.add, self.bias) if vector is not None]
        return float(np.linalg.norm(np.sum(added, axis=0))) if added else 0.0


Edits = Mapping[int, LayerEdit]
"""The edited layers, counted from 0."""


def orthonormal_rows(rows: ArrayLike) -> NDArray[np.float32]:
    """Return orthonormal rows that span the same as `rows` [k, n_embd], in the same order.

    Gram-Schmidt in float64, twice per row for accuracy. Rows that are orthonormal already come back bit for
    bit, so that a control file survives being read and written again.

    Raises:
        SteeringError: all rows are zero.
    """
    given = np.asarray(rows, dtype=np.float64)
    if is_orthonormal(given):
        return np.asarray(rows, dtype=np.float32)
    basis: list[NDArray[np.float64]] = []
    largest = np.abs(given).max(initial=0.0)
    for row in given:
        peak = np.abs(row).max()
        if peak <= largest * np.finfo(np.float32).tiny:
            continue
        rest = row / peak  # before squaring: the squares of very small or large values leave float range
        rest = rest / np.linalg.norm(rest)
        for _ in range(2):
            for vector in basis:
                rest = rest - (vector @ rest) * vector
        length = np.linalg.norm(rest)
        if length > _DEPENDENT:
            basis.append(rest / length)
    if not basis:
        raise SteeringError("the directions to remove are all zero; give at least one that is not")
    return np.stack(basis).astype(np.float32)


def is_orthonormal(rows: ArrayLike, tolerance: float = ORTHONORMAL_TOLERANCE) -> bool:
    """Whether the rows [k, n_embd] have length 1 and right angles, within `tolerance` per product."""
    array = np.asarray(rows, dtype=np.float64)
    if array.shape[0] > array.shape[1]:
        return False
    gram = array @ array.T
    return bool(np.abs(gram - np.eye(len(gram))).max() <= tolerance)


_MAX_STRENGTH = float(np.finfo(np.float32).max)


def check_strength(strength: float) -> float:
    """Return `strength` as a float.

    Raises:
        SteeringError: it is negative, not finite in float32, or no number.
    """
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= _MAX_STRENGTH:
        raise SteeringError(
            f"the strength is {strength}; give a finite number that is not negative (0 is off)"
        )
    return value


def apply(x: ArrayLike, edit: LayerEdit, strength: float = 1.0) -> NDArray[Any]:
    """Apply an edit to an MLP output `x` [..., n_embd]: x + s (V^T G V x + b + a).

    The runtime adds a after the residual addition that follows the MLP. That is the same sum, save for
    architectures with a norm between the two; those see `apply_to_mlp` before it and `apply_to_block` after.
    """
    return apply_to_block(apply_to_mlp(x, edit, strength), edit, strength)


def apply_to_mlp(x: ArrayLike, edit: LayerEdit, strength: float = 1.0) -> NDArray[Any]:
    """Return x + s (V^T G V x + b) for an MLP output [..., n_embd]."""
    x, strength = np.asarray(x), check_strength(strength)
    edited = x if edit.remove is None else x + strength * ((x @ edit.remove.T) * edit.gains) @ edit.remove
    return edited if edit.bias is None else edited + strength * edit.bias


def apply_to_block(h: ArrayLike, edit: LayerEdit, strength: float = 1.0) -> NDArray[Any]:
    """Return h + s a for a block output [..., n_embd]."""
    h, strength = np.asarray(h), check_strength(strength)
    return h if edit.add is None else h + strength * edit.add


def edits_sha256(edits: Edits, gate: Gate | None = None) -> str:
    """Return the SHA-256, in hex digits, of what a control does: its edits, and its gate if it has one.

    Args:
        edits: the layers, shapes and values count; their order does not.
        gate: decides which requests are steered; None steers all of them.
    """
    value = hashlib.sha256()
    for layer, edit in sorted(edits.items()):
        arrays: tuple[NDArray[np.float32] | None, ...] = (edit.remove, edit.add)
        if edit.gain is not None or edit.bias is not None:
            arrays = (*arrays, edit.gain, edit.bias)
        for array in arrays:
            value.update(f"{layer} {None if array is None else array.shape} ".encode())
            value.update(b"" if array is None else array.tobytes())
    if gate is not None:
        value.update(gate.digest.encode())
    return value.hexdigest()


def paper_edits(
    directions: Directions,
    class_gap: ArrayLike,
    *,
    threshold: float = 0.5,
    layers: Iterable[int] | None = None,
) -> dict[int, LayerEdit]:
    """Turn probes into edits by the decision rule of AlignEZ, layer by layer.

    A probe that gives harmful embeddings the higher probability of class 1 is theta_harm: its direction is
    removed if it gives them at least `threshold` on average. Otherwise it is theta_help: its unit vector is
    added if it gives helpful embeddings at least `threshold`. Else the layer is left alone. The paper asks
    for an average "about 1"; its authors' code for .5, the default here.

    The length of a probe is arbitrary, so the addition is scaled to the gap between the class means along it:
    strength 1 moves a harmful embedding by as much as the helpful ones lie away on average.

    Args:
        directions: the first vector of each layer is used.
        class_gap: [n_layer, n_embd], mean helpful minus mean harmful embedding.
        threshold: a mean probability, 0 to 1.
        layers: the layers that may be edited; all if `None`.

    Returns:
        The edited layers; empty if the rule leaves every layer alone.
    """
    gap = _gap_like(directions.vectors, class_gap)
    edits: dict[int, LayerEdit] = {}
    for layer in _chosen(layers, len(gap)):
        p_helpful, p_harmful = directions.p_helpful[layer], directions.p_harmful[layer]
        theta = directions.vectors[layer, :1]
        if p_harmful > p_helpful:
            if p_harmful >= threshold and theta.any():
                edits[layer] = LayerEdit(remove=theta)
        elif p_helpful >= threshold:
            edits[layer] = LayerEdit(add=_within(theta, gap[layer]))
    return _effective(edits)


def span_edits(
    vectors: ArrayLike,
    class_gap: ArrayLike,
    *,
    remove: bool,
    amount: float = 0.0,
    layers: Iterable[int] | None = None,
    added: Iterable[int] | None = None,
) -> dict[int, LayerEdit]:
    """Make the same edit on the span of the directions of every layer.

    With V the directions of a layer and g its class gap, the removal takes V^T V x away and the addition adds
    `amount` x V^T V g. So `remove=True` alone is removal, `amount` alone addition, and both together put a
    part of the class gap where the removed component was.

    Args:
        vectors: [n_layer, k, n_embd], orthonormal rows; a layer of zeros is left alone.
        class_gap: [n_layer, n_embd], mean helpful minus mean harmful embedding.
        remove: whether to remove the span.
        amount: share of the class gap inside the span that is added.
        layers: the layers to edit; all if `None`.
        added: those of them that take the addition; all if `None`.
    """
    v = np.asarray(vectors)
    gap = _gap_like(v, class_gap)
    adds = None if added is None else set(added)
    edits = {
        layer: LayerEdit(
            add=(amount * _within(v[layer], gap[layer])).astype(np.float32)
            if amount and (adds is None or layer in adds)
            else None,
            remove=v[layer] if remove and v[layer].any() else None,
        )
        for layer in _chosen(layers, len(gap))
    }
    return _effective(edits)


def with_additions_at_mlp(edits: Edits) -> dict[int, LayerEdit]:
    """Return the same edits with what they add moved from the output of the block to that of its MLP.

    A gap between MLP outputs is added there, where a norm lies between the two.
    """
    return {layer: replace(edit, add=None, bias=edit.add) for layer, edit in edits.items()}


def _finite(name: str, values: ArrayLike) -> NDArray[np.float32]:
    try:
        array = np.asarray(values)
        if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"values of type {array.dtype}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise SteeringError(f"`{name}` must be an array of real numbers: {error}") from error
    if not np.isfinite(array).all():
        raise SteeringError(
            f"`{name}` has values that are NaN or infinite in float32; fit the direction again"
        )
    return array


def _frozen(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array = np.array(array, dtype=np.float32, order="C", copy=True)
    array.flags.writeable = False
    return array


def _within(rows: NDArray[Any], vector: NDArray[Any]) -> NDArray[np.float32]:
    """Return the part of `vector` inside the span of orthonormal `rows`, V^T V vector."""
    return np.asarray((rows @ vector) @ rows, dtype=np.float32)


def _gap_like(vectors: NDArray[Any], class_gap: ArrayLike) -> NDArray[Any]:
    gap = np.asarray(class_gap)
    if vectors.ndim != 3 or gap.shape != (vectors.shape[0], vectors.shape[2]):
        raise SteeringError(
            f"directions {list(vectors.shape)} and class gap {list(gap.shape)} do not belong together; "
            "they must be [n_layer, k, n_embd] and [n_layer, n_embd] of one fit"
        )
    return gap


def _chosen(layers: Iterable[int] | None, n_layer: int) -> list[int]:
    if layers is None:
        return list(range(n_layer))
    chosen = sorted(set(layers))
    for layer in chosen:
        if not 0 <= layer < n_layer:
            raise SteeringError(f"there is no layer {layer}; the model has the layers 0 to {n_layer - 1}")
    return chosen


def _effective(edits: Mapping[int, LayerEdit]) -> dict[int, LayerEdit]:
    return {layer: edit for layer, edit in edits.items() if edit.decision != "none"}
