"""Setting, changing and clearing edits: beside another context, and so often that a leak would show.

Under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer, by contexts.cpp; and in the
installed library, which is what users run.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import SteeringError
from fuzz import Outcome, Scale
from fuzz.building import program
from fuzz.corpus import N_EMBD, N_LAYER
from fuzz.loader import ENVIRONMENT, SANITIZERS, reason
from fuzz.tiny_model import tiny_model

if TYPE_CHECKING:
    from alignez_gguf.runtime.context import Context

STRENGTHS = (0.0, 0.5, 1.0)

_ROUNDS_SHARE = 20
"""One round of two contexts beside each other for so many cycles: it decodes, and is watched closely."""
_CYCLE_BYTES = 16
"""A growth of this much per cycle, or more, is a leak: a lost pointer costs as much."""
_ROOM = 2**20
"""Bytes by which the resident memory of the installed library may grow: pages that its heap did not reuse."""
_WARM_UP = 200
_LIMIT_S = 1200


def stress(scale: Scale, folder: Path) -> Sequence[Outcome]:
    """Two contexts over one model, and `scale.cycles` cycles, three times over."""
    model = tiny_model(folder)
    rounds = scale.cycles // _ROUNDS_SHARE
    return [
        watched("set, decode and clear, ASan and UBSan", SANITIZERS, model, rounds, scale.cycles, folder),
        watched("set, decode and clear, TSan", "thread", model, rounds, 0, folder),
        installed(scale.cycles, model),
    ]


def watched(name: str, sanitizers: str, model: Path, rounds: int, cycles: int, folder: Path) -> Outcome:
    """`rounds` in each of two contexts at once, then `cycles` in one, under sanitizers."""
    # Before GCC 13, ThreadSanitizer cannot live with the address randomisation of newer kernels.
    command = ["setarch", "-R"] if sanitizers == "thread" and shutil.which("setarch") else []
    command += [str(program("contexts", sanitizers)), str(model), str(rounds), str(cycles)]
    environment = os.environ | ENVIRONMENT | {"TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
    findings = []
    detail = f"{rounds:,} rounds beside each other"
    if result.returncode != 0:
        (folder / f"{sanitizers.replace(',', '-')}.log").write_text(result.stderr, encoding="utf-8")
        last = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        findings.append(reason(result.stderr) or last)
    elif cycles:
        before, after = map(int, result.stdout.split())
        detail += f", {after - before:+,} bytes over {cycles:,} cycles"
        if after - before >= _CYCLE_BYTES * cycles:
            findings.append(f"memory grows by {(after - before) / cycles:.0f} bytes a cycle")
    return Outcome(name, 2 * rounds + cycles, tuple(findings), detail)


def installed(cycles: int, model: Path) -> Outcome:
    """`cycles` in the library that llama-cpp-python has loaded, through the package's own bindings."""
    from alignez_gguf.runtime.context import Context
    from alignez_gguf.runtime.model import Model

    loaded = Model(model)
    context = Context(loaded, n_ctx=32, n_batch=8, n_threads=1)
    steered = _Steered(context)
    findings: set[str] = set()
    before = 0
    for cycle in range(-_WARM_UP, cycles):
        if cycle == 0:
            before = _resident_bytes()
        findings.update(steered.cycle(STRENGTHS[cycle % len(STRENGTHS)], decode=cycle % 100 == 0))
    growth = _resident_bytes() - before
    context.close()
    loaded.close()
    if growth > _ROOM:
        findings.add(f"resident memory grows by {growth / cycles:.0f} bytes a cycle")
    detail = f"{growth / 1024:+,.0f} KiB of resident memory"
    return Outcome("set, change and clear, installed library", cycles, tuple(sorted(findings)), detail)


class _Steered:
    """A context whose edit comes and goes, and what it answers without one."""

    def __init__(self, context: Context) -> None:
        edit = LayerEdit(np.full(N_EMBD, 0.25, np.float32), np.eye(3, N_EMBD, dtype=np.float32))
        self._context = context
        self._edits = dict.fromkeys(range(N_LAYER), edit)
        self._misplaced = {N_LAYER: edit}
        self._unsteered = self._answer()

    def cycle(self, strength: float, *, decode: bool) -> Iterator[str]:
        """Set, change, try a wrong edit, and clear; what went wrong."""
        from alignez_gguf.runtime import bindings

        pointer = self._context.pointer
        bindings.set_edits(pointer, self._edits)
        bindings.set_strength(pointer, strength)
        steered = self._answer() if decode else None
        if steered is not None and np.array_equal(steered, self._unsteered) != (strength == 0):
            yield f"strength {strength} is not what it says"
        with suppress(SteeringError):
            bindings.set_edits(pointer, self._misplaced)
            yield "an edit of a layer that the model has not was set"
        if steered is not None and not np.array_equal(self._answer(), steered):
            yield "an edit that was refused changed the one in force"
        bindings.set_edits(pointer, {})
        if decode and not np.array_equal(self._answer(), self._unsteered):
            yield "the model is not what it was after the edit was cleared"

    def _answer(self) -> NDArray[np.float32]:
        self._context.clear()
        self._context.decode([2, 3, 5], range(3), [0] * 3, [False, False, True])
        return np.array(self._context.logits(2))


def _resident_bytes() -> int:
    """Of this process, now; where the system does not say, the most so far."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
