"""What was measured, for a terminal, as JSON, and as the tables of docs/performance.md."""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import BenchError, Figure, Measured

_LIFTED = ("switching", "switch_ms")
"""A figure that has a place of its own in the JSON."""

_END = "<!-- end -->"


class NoPlaceError(BenchError):
    """The document has no place for a table."""


def as_json(found: Mapping[str, Measured], about: Mapping[str, str]) -> dict[str, Any]:
    """Values by measurement and key; quartiles, anchors, and what was measured on in keys of their own."""
    values: dict[str, Any] = {
        name: {key: _rounded(figure.value) for key, figure in measured.figures.items()}
        for name, measured in found.items()
    }
    name, key = _LIFTED
    if name in values:
        values[key] = values[name].pop(key)
    return values | {
        "spread": {
            name: {
                key: [_rounded(figure.low), _rounded(figure.high)]
                for key, figure in measured.figures.items()
                if figure.low is not None
            }
            for name, measured in found.items()
        },
        "anchors": {name: dict(measured.anchors) for name, measured in found.items()},
        "machine": dict(about),
    }


def as_text(found: Mapping[str, Measured]) -> str:
    """A line for each figure."""
    lines = []
    for name, measured in found.items():
        lines.append(f"{name}  ({_anchors(measured)})")
        for key, figure in measured.figures.items():
            lines.append(
                f"  {key:28s}{_value(figure):>14s}  {_spread(figure):18s}{_wanted(figure):>10s}  "
                f"{figure.meaning}"
            )
    return "\n".join(lines)


def require_places(path: Path, names: Iterable[str], device: str) -> None:
    """Raise `NoPlaceError` where `write` would: a document has no place for one of these measurements."""
    text = _text(path)
    for name in names:
        _around_place(path, text, name, device)


def write(path: Path, found: Mapping[str, Measured], about: Mapping[str, str]) -> None:
    """Put the table of each measurement in its place in a document.

    The place is between `<!-- NAME on DEVICE -->` and `<!-- end -->`; what was there goes.

    Raises:
        NoPlaceError: a place is missing; nothing is written.
    """
    text = _text(path)
    for name, measured in found.items():
        before, after = _around_place(path, text, name, about["device"])
        text = "".join((before, as_markdown(measured, about), "\n", after))
    path.write_text(text, encoding="utf-8")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise NoPlaceError(f"{path} cannot be read ({error.strerror}); name a document") from error


def _around_place(path: Path, text: str, name: str, device: str) -> tuple[str, str]:
    """The text up to the place of a table, and from its end on."""
    mark = f"<!-- {name} on {device} -->\n"
    before, found, rest = text.partition(mark)
    _, end, after = rest.partition(_END)
    if not found or not end:
        raise NoPlaceError(f"{path} has no {mark.strip()} ... {_END} to put a table into")
    return before + mark, end + after


def as_markdown(measured: Measured, about: Mapping[str, str]) -> str:
    """A table, and a line that says what it was measured on."""
    rows = [
        f"| `{key}` | {figure.meaning} | {_value(figure)} | {_spread(figure)} | {_wanted(figure)} |"
        for key, figure in measured.figures.items()
    ]
    return "\n".join(
        [
            "| figure | what it is | median | quartiles | wanted |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"{about['date']}, {about['processor']}, {about['model']}; {_anchors(measured)}.",
        ]
    )


def about_machine(model: Path, n_threads: int, n_gpu_layers: int) -> dict[str, str]:
    """What the figures were measured on: device, processor, model, date.

    The device is `gpu`, `cpu with amx` or `cpu`: each has kernels of its own.
    """
    import llama_cpp

    from alignez_gguf.installer.status import status

    gpus = [device.description for device in status().devices if device.name != "CPU"]
    on_gpu = n_gpu_layers != 0 and bool(llama_cpp.llama_supports_gpu_offload()) and bool(gpus)
    amx = b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()
    cpu = "cpu with amx" if amx else "cpu"
    processor = f"{n_threads} threads of {_processor()}{', with AMX' if amx else ''}"
    return {
        "device": "gpu" if on_gpu else cpu,
        "processor": f"{gpus[0]}, {processor}" if on_gpu else processor,
        "model": model.stem,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    """The name of the processor, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _anchors(measured: Measured) -> str:
    return ", ".join(f"{name} {version}" for name, version in measured.anchors.items())


def _value(figure: Figure) -> str:
    return figure.reason if figure.value is None else f"{_number(figure.value)}{figure.unit}"


def _spread(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{_number(figure.low)} - {_number(figure.high)}"


def _wanted(figure: Figure) -> str:
    """What must hold; else which way is better."""
    if figure.bound is None:
        return figure.better
    return f"{'<=' if figure.better == 'lower' else '>='} {_number(figure.bound)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
