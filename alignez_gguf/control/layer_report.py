"""The figures of the fit of every layer, as a control file stores them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.errors import ControlFileError

if TYPE_CHECKING:
    from alignez_gguf.directions.base import Directions

REQUIRED_FIGURES = ("accuracy", "p_helpful", "p_harmful")
FIGURES = (*REQUIRED_FIGURES, "loss", "spread", "flipped")


@dataclass(frozen=True, eq=False)
class LayerReport:
    """The figures of the fit of every layer, edited or not. All arrays are float32 [n_layer].

    Attributes:
        accuracy: accuracy of the probe on held-out pairs, 0 to 1.
        p_helpful, p_harmful: mean probability of class 1 over helpful and over harmful embeddings.
        loss: loss of the probe; `None` for a method without one.
        spread: spread of the restarts of the probe, from 0, where all found the same direction, to 1;
            `None` for a method without restarts.
        flipped: share of the restarts whose class 1 is the other one than that of the kept probe; `None`
            likewise.
    """

    accuracy: NDArray[np.float32]
    p_helpful: NDArray[np.float32]
    p_harmful: NDArray[np.float32]
    loss: NDArray[np.float32] | None = None
    spread: NDArray[np.float32] | None = None
    flipped: NDArray[np.float32] | None = None

    def columns(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield the figures that exist, by name."""
        for name in FIGURES:
            values = getattr(self, name)
            if values is not None:
                yield name, values

    def check(self, n_layer: int) -> None:
        """Check that every figure is one finite number per layer.

        Raises:
            ControlFileError: it is not.
        """
        for name, values in self.columns():
            if values.shape != (n_layer,) or not np.isfinite(values).all():
                raise ControlFileError(
                    f"layer.{name} must hold one finite number for each of {n_layer} layers"
                )

    @classmethod
    def of(cls, directions: Directions) -> LayerReport:
        return cls(
            accuracy=directions.accuracy,
            p_helpful=directions.p_helpful,
            p_harmful=directions.p_harmful,
            loss=directions.loss,
            spread=directions.spread,
            flipped=directions.flipped,
        )
