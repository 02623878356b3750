"""A weight without the removed directions, in the type that the file keeps it in.

Plain requantization brings much of what was removed back: the weight lies on the grid of its type already,
the removal moves it by less than a step, and rounding moves it home (two random directions of 1024: 47 % are
back in Q4_K, 57 % in Q4_0). So what came back is subtracted from the target, and the target rounded again,
until no more goes: 5 % and 4 % are left after five rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import ModelFileError
from alignez_gguf.exporters.weights import DownProjection
from alignez_gguf.runtime.quantize import quantize

_ROUNDS = 8
_COLUMNS = 1024
"""The columns of n_ff that are computed at once; a multiple of every block size."""
_ENOUGH, _MAX_BACK = 0.02, 0.1
"""Share of the removed component that may come back: no further rounds are made, and at most."""
_GAIN = 0.9
"""A round that leaves more than this share of the round before it was the last."""


@dataclass(frozen=True)
class RoundingLoss:
    """Squared lengths of which `Loss` is made; add up over the pieces of a weight."""

    returned: float = 0.0
    removed: float = 0.0
    rounding: float = 0.0
    weight: float = 0.0

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(
            self.returned + other.returned,
            self.removed + other.removed,
            self.rounding + other.rounding,
            self.weight + other.weight,
        )

    @property
    def came_back(self) -> float:
        """Share of the removed component that is in the rounded weight again, 0 to 1."""
        return _ratio(self.returned, self.removed)

    @property
    def error(self) -> float:
        """Root mean square of what rounding changed, relative to the weight."""
        return _ratio(self.rounding, self.weight)


class Requantiser:
    """W + s V^T G V W of a down projection in a type, piece by piece.

    Args:
        down: the weight W.
        edit: with V, [k, n_embd], and its gains G.
        strength: s.
    """

    def __init__(self, down: DownProjection, edit: LayerEdit, strength: float) -> None:
        assert edit.remove is not None
        self._down = down
        self._vectors = edit.remove
        self._factors = np.float32(strength) * edit.gains[:, None]
        self._columns = min(_COLUMNS, down.weight.shape[-1])

    def fits(self, kind: Any, tolerance: float) -> bool:
        """Whether a type keeps the error within `tolerance`, and what was removed away.

        Judged by a piece in the middle of the first expert.
        """
        starts = list(self._starts())
        done = self._piece(0, starts[len(starts) // 2], kind)
        return done is not None and done[1].error <= tolerance and done[1].came_back <= _MAX_BACK

    def rows(self, kind: Any) -> tuple[NDArray[np.uint8], RoundingLoss]:
        """The whole weight, in bytes [.., n_embd, bytes of a row].

        Raises:
            ModelFileError: ggml cannot write the type.
        """
        experts = []
        total = RoundingLoss()
        for expert in range(self._down.n_expert):
            pieces = []
            for start in self._starts():
                done = self._piece(expert, start, kind)
                if done is None:
                    raise ModelFileError(f"{self._down.weight.name} cannot be written as {kind.name}")
                pieces.append(done[0])
                total += done[1]
            experts.append(np.concatenate(pieces, axis=1))
        rows = np.stack(experts) if self._down.kind == "experts" else experts[0]
        return rows, total

    def _starts(self) -> Iterator[int]:
        return iter(range(0, self._down.weight.shape[-1], self._columns))

    def _piece(self, expert: int, start: int, kind: Any) -> tuple[NDArray[np.uint8], RoundingLoss] | None:
        """Some columns of an expert's weight; `None` where ggml cannot write the type."""
        import gguf

        weight = self._down.columns(expert, start, start + self._columns)
        v = self._vectors
        component = v @ weight
        change = self._factors * component
        kept = component + change
        wanted = weight + v.T @ change
        target = wanted.copy()
        best: tuple[NDArray[np.uint8], RoundingLoss] | None = None
        removed, length = _energy(change), _energy(weight)
        for _ in range(_ROUNDS):
            rows = quantize(target, kind)
            if rows is None:
                return None
            rounded = np.asarray(gguf.dequantize(rows, kind), np.float32).reshape(wanted.shape)
            back = v @ rounded - kept
            share = RoundingLoss(_energy(back), removed, _energy(rounded - wanted), length)
            if best is not None and share.came_back > _GAIN * best[1].came_back:
                return best if best[1].came_back <= share.came_back else (rows, share)
            best = rows, share
            if share.came_back <= _ENOUGH:
                break
            target -= v.T @ back
        return best


def _energy(values: NDArray[np.float32]) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _ratio(part: float, whole: float) -> float:
    return float(np.sqrt(part / whole)) if whole else 0.0
