"""What the stresses of `tools/fuzz/stress.py` have in common: how much to try, and what came of it.

`tools/fuzz/stress.py` imports `fuzz.NAME` when NAME is to run, and calls its function `stress`. They run two
at a time, in processes apart from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True)
class Outcome:
    """A row of the table: what was tried, and what went wrong."""

    name: str
    """Such as "mutated files, C++ loader"."""
    tried: int
    """Inputs tried, faults injected, requests sent, or cycles run."""
    findings: tuple[str, ...] = ()
    """Each one line: what went wrong, and with what (the name of a saved file, or a seed)."""
    detail: str = ""
    """Short: "slowest 0.03 s, at most 1.2x the file in memory"."""
    kind: Literal["inputs", "faults"] = "inputs"


@dataclass(frozen=True)
class Scale:
    """How much each stress tries."""

    inputs: int
    """Mutated files, of each reader."""
    kills: int
    """Of each command."""
    requests: int
    """To the server."""
    cycles: int
    """Of setting, changing and clearing an edit."""
    seed: int = 0
    """Of all that is chosen by chance; the same seed makes the same inputs."""


SHORT = Scale(inputs=2_000, kills=2, requests=200, cycles=200)
"""For the tests."""
LONG = Scale(inputs=1_000_000, kills=100, requests=10_000, cycles=10_000)
"""By hand: at most 30 minutes on 2 cores."""


class Stress(Protocol):
    """The function `stress` of a module: tries things, as often as `scale` says.

    `folder` exists and is the stress's own; the files behind the findings are kept there.
    """

    def __call__(self, scale: Scale, folder: Path) -> Sequence[Outcome]: ...
