"""Draws the plots of a report as SVG for an HTML page; the same data give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignez_gguf.errors import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BASE, _GOOD, _BAD, _NEUTRAL = "#6b7280", "#1f77b4", "#c2410c", "#9ca3af"
_WIDTH, _HEIGHT = 6.4, 3.0
_ID = re.compile(r'(\bid="|url\(#|href="#)')


def draw_plots(document: Mapping[str, Any]) -> dict[str, str]:
    """Draw the plots that `document` has data for, and return their SVG by name."""
    drawn = {
        "net_win": _figure("net_win", lambda axes: _net_win(axes, document["systems"])),
        "layers": _figure("layers", lambda axes: _layers(axes, document["layers"])),
    }
    if document["selection"]:
        drawn["selection"] = _figure("selection", lambda axes: _selection(axes, document["selection"]))
    if document["projections"]:
        labels = [row["harmful"] for row in document["rows"]]
        drawn["projections"] = _figure(
            "projections", lambda axes: _projections(axes, document["projections"], labels)
        )
    return drawn


def require_matplotlib() -> None:
    """Raise `MissingExtraError` if the plots cannot be drawn, before anything long has begun."""
    with require_extra("report", "the report of an evaluation"):
        import_module("matplotlib")


def _figure(name: str, draw: Any) -> str:
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        draw(figure.subplots())
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata={"Date": None, "Creator": None})
    svg = page.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names have to be unique in the page, not only in the figure.
    return _ID.sub(rf"\g<1>{name}-", svg)


def _net_win(axes: Axes, systems: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (f"{system['name']}: {aspect}", result["net_win_percent"])
        for system in systems
        for aspect, result in system["aspects"].items()
        if result["net_win_percent"]["value"] is not None
    ]
    for position, (_, estimate) in enumerate(reversed(rows)):
        value, low, high = estimate["value"], estimate["low"], estimate["high"]
        if low is not None:
            axes.plot([low, high], [position, position], color=_GOOD, linewidth=2)
        axes.plot([value], [position], "o", color=_GOOD)
    axes.axvline(0, color=_NEUTRAL, linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)])
    axes.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axes.set_xlabel("Net Win against the base model, %, with 95% interval")


def _layers(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    numbers = [row["layer"] for row in layers]
    if layers and "accuracy" in layers[0]:
        axes.plot(numbers, [row["accuracy"] for row in layers], "o-", color=_BASE, label="held-out accuracy")
        axes.plot(
            numbers, [row["p_helpful"] for row in layers], ":", color=_GOOD, label="P(class 1), helpful"
        )
        axes.plot(numbers, [row["p_harmful"] for row in layers], ":", color=_BAD, label="P(class 1), harmful")
        axes.set_ylim(-0.05, 1.05)
    else:
        axes.bar(numbers, [row["rank"] for row in layers], color=_BASE, label="removed dimensions")
    edited = [row["layer"] for row in layers if row["decision"] != "none"]
    for layer in edited:
        axes.axvspan(layer - 0.4, layer + 0.4, color=_GOOD, alpha=0.12, linewidth=0, label="_edited")
    axes.set_xlabel("layer (shaded: edited)")
    axes.legend(frameon=False, fontsize=8)


def _selection(axes: Axes, tried: Sequence[Mapping[str, Any]]) -> None:
    measured = [row for row in tried if row["kl"] >= 0]
    axes.plot(
        [row["kl"] for row in measured], [row["score"] for row in measured], ".", color=_BASE, alpha=0.7
    )
    axes.axhline(0, color=_NEUTRAL, linewidth=1)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlabel("KL(base || steered), nat per token")
    axes.set_ylabel("score, nat")


def _projections(axes: Axes, projections: Mapping[str, Any], labels: Sequence[bool | None]) -> None:
    before, after = projections["before"], projections["after"]
    low, high = min(*before, *after), max(*before, *after)
    bins = [low + (high - low) * step / 40 for step in range(41)] if high > low else 10
    groups = {True: ("harmful", _BAD), False: ("harmless", _GOOD), None: ("unlabelled", _BASE)}
    for label, (name, color) in groups.items():
        chosen = [index for index, given in enumerate(labels) if given is label]
        if chosen:
            axes.hist(
                [before[index] for index in chosen],
                bins,
                histtype="step",
                linestyle="--",
                color=color,
                label=f"{name}, before",
            )
            axes.hist(
                [after[index] for index in chosen], bins, color=color, alpha=0.45, label=f"{name}, after"
            )
    axes.set_xlabel(f"residual stream at the end of layer {projections['layer']}, along the edited direction")
    axes.set_ylabel("queries")
    axes.legend(frameon=False, fontsize=8)
