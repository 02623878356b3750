"""Formats and parses lists of layers."""

from __future__ import annotations

from alignez_gguf.errors import SteeringError


def span(layers: tuple[int, ...]) -> str:
    """Format layers as ranges: "0-5", or "0-2,4"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def parse_layers(text: str | None, n_layer: int) -> tuple[int, ...] | None:
    """Parse layers written as "4-20", "4-" or "3,5,8"; None stays None.

    Args:
        text: the layers, counted from 0.
        n_layer: the number of layers of the model, where "4-" ends.

    Raises:
        SteeringError: the text is not understood, or the model has no such layer.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or not (last.isdecimal() or (dash and not last) or not dash):
            raise SteeringError(f"the layers {text!r} are not understood; write them as 4-20, 4- or 3,5,8")
        start = int(first)
        end = int(last) if last else n_layer - 1 if dash else start
        if not start <= end < n_layer:
            raise SteeringError(f"the layers {text!r} are not all in the model, which has 0 to {n_layer - 1}")
        layers.update(range(start, end + 1))
    return tuple(sorted(layers))
