"""Mutated files through the control vector loader of the patched llama.cpp, under sanitizers.

Every file ends in an error with a reason, or in the very vectors that the file holds. Some of those that load
are set on a model, decoded under, and cleared, after which the model answers as it did before.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fuzz import Outcome, Scale
from fuzz.building import program
from fuzz.mutation import corpus, mutated
from fuzz.tiny_model import tiny_model

SANITIZERS = "address,undefined"
ENVIRONMENT = {
    # An allocation that cannot be had is a null pointer, as it is without the sanitizer.
    "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=4096:detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "GGML_NO_BACKTRACE": "1",
}

_REFUSED, _LOADED, _NOT_SET, _SET = range(4)
_COMPLAINTS = {
    4: "loaded, but a vector is not as wide as the rest",
    5: "refused without a reason",
    6: "the model is not what it was after the edit was refused or cleared",
}
_RESULT = struct.Struct("<IIQQ")
_BATCH = 500
_EVERY = 20
"""Of the files that load, which one is set and decoded under as well; takes milliseconds."""
_LIMIT_TIMES, _LIMIT_CONSTANT = 4, 256 * 1024
"""Bytes that the loader may allocate: so many for each of the file, and what small objects need."""
_COMPARED = 4
"""Of the files that load, which one's vectors are compared with what the Python reader finds."""
_ENOUGH = 25
"""Different findings after which there is no point in going on."""
_HANG_S = 120
_SAID = 100_000


@dataclass
class _Tally:
    """What came of the files so far."""

    folder: Path
    tried: int = 0
    loaded: int = 0
    set: int = 0
    compared: int = 0
    slowest_us: int = 0
    most_bytes: int = 0
    findings: dict[str, str] = field(default_factory=dict)
    """By what went wrong; with how it was found first."""

    def find(self, what: str, number: int, data: bytes) -> None:
        if what not in self.findings:
            path = self.folder / f"loader-{number}.gguf"
            path.write_bytes(data)
            self.findings[what] = f"{what} (first by {path.name})"

    def outcome(self) -> Outcome:
        detail = (
            f"{self.loaded:,} loaded, {self.set:,} set and decoded under, {self.compared:,} compared; "
            f"slowest {self.slowest_us / 1e6:.3f} s, at most {self.most_bytes / 1024:.0f} KiB"
        )
        return Outcome("mutated files, C++ loader", self.tried, tuple(self.findings.values()), detail)


def stress(scale: Scale, folder: Path) -> Sequence[Outcome]:
    """Give `scale.inputs` mutated files to the loader."""
    return [run([str(program("loader", SANITIZERS))], scale, folder, tiny_model(folder))]


def run(command: Sequence[str], scale: Scale, folder: Path, model: Path) -> Outcome:
    """Give `scale.inputs` mutated files to the harness that `command` starts."""
    seeds = corpus()
    tally = _Tally(folder)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else folder) as scratch:
        harness = _Harness([*command, str(model), str(Path(scratch) / "input.gguf"), str(_EVERY)], folder)
        for first in range(0, scale.inputs, _BATCH):
            numbers = range(first, min(first + _BATCH, scale.inputs))
            files = [mutated(seeds, scale.seed, number) for number in numbers]
            for number, data, result in zip(numbers, files, harness.results(files), strict=True):
                _judge(tally, number, data, result, Path(scratch))
            if len(tally.findings) >= _ENOUGH:
                break
            if tally.tried % _SAID == 0:
                print(f"loader: {tally.tried:,} files", file=sys.stderr, flush=True)
        if failure := harness.close():
            tally.findings[failure] = failure
    return tally.outcome()


def _judge(tally: _Tally, number: int, data: bytes, result: tuple[int, ...] | str, scratch: Path) -> None:
    tally.tried += 1
    if isinstance(result, str):
        tally.find(result, number, data)
        return
    status, checksum, cpu_us, peak = result
    tally.slowest_us = max(tally.slowest_us, cpu_us)
    tally.most_bytes = max(tally.most_bytes, peak)
    if complaint := _COMPLAINTS.get(status):
        tally.find(complaint, number, data)
    if peak > _LIMIT_TIMES * len(data) + _LIMIT_CONSTANT:
        tally.find(f"more than {_LIMIT_TIMES}x the file and {_LIMIT_CONSTANT >> 10} KiB", number, data)
    if status in (_LOADED, _NOT_SET, _SET):
        tally.loaded += 1
        tally.set += status == _SET
        if (
            tally.loaded % _COMPARED == 0
            and (expected := _checksum(data, scratch / "compared.gguf")) is not None
        ):
            tally.compared += 1
            if expected != checksum:
                tally.find("loaded other vectors than the file holds", number, data)


def _checksum(data: bytes, path: Path) -> int | None:
    """Of the vectors that the Python reader finds; `None` where it refuses the file, or leaves out zeros."""
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.gguf_header import read_header
    from alignez_gguf.errors import ControlFileError

    path.write_bytes(data)
    try:
        edits = ControlFile.load(path).edits
    except ControlFileError:
        return None
    added = [(layer, edit.add) for layer, edit in edits.items() if edit.add is not None]
    removed = [(layer, edit.remove) for layer, edit in edits.items() if edit.remove is not None]
    if len(added) + len(removed) != len(read_header(path).tensors):
        return None
    checksum = 0
    for layer, vectors in (*added, *removed):
        checksum = zlib.crc32(struct.pack("<i", layer), checksum)
        checksum = zlib.crc32(vectors.astype("<f4").tobytes(), checksum)
    return checksum


class _Harness:
    """The program under test, started again whenever it dies."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command = command
        self._log = folder / "loader.log"
        self._process = self._start()

    def results(self, files: Sequence[bytes]) -> Iterator[tuple[int, int, int, int] | str]:
        """For each file what the program says of it, or how the program died."""
        left = list(files)
        while left:
            done = 0
            for result in self._answers(left):
                yield result
                done += 1
            del left[:done]
            if left:
                yield self._death()
                del left[0]
                self._process = self._start()

    def close(self) -> str | None:
        """End the program; what it, and the check for leaks, say then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return None if self._process.wait(_HANG_S) == 0 else self._death()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | ENVIRONMENT,
            )

    def _answers(self, files: Sequence[bytes]) -> Iterator[tuple[int, int, int, int]]:
        """As many answers as the program gives before it dies."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        # A process that hangs without using the processor is ended here; the program itself ends others.
        watchdog = threading.Timer(_HANG_S, self._process.kill)
        watchdog.start()
        try:
            with suppress(BrokenPipeError):
                stdin.write(b"".join(struct.pack("<I", len(data)) + data for data in files))
                stdin.flush()
            for _ in files:
                answer = stdout.read(_RESULT.size)
                if len(answer) < _RESULT.size:
                    return
                yield _RESULT.unpack(answer)
        finally:
            watchdog.cancel()

    def _death(self) -> str:
        """How the program ended, in one line without addresses."""
        status = self._process.wait(_HANG_S)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if status == -signal.SIGPROF:
            return "still at work after 1 s of the processor"
        if status == -signal.SIGKILL:
            return f"no answer for {_HANG_S} s"
        return f"died: {reason(self._log.read_text(encoding='utf-8', errors='replace')) or status}"


def reason(log: str) -> str:
    """The line in which a sanitizer, or an assertion, says what is wrong, without numbers that vary."""
    marks = ("SUMMARY:", "runtime error:", "GGML_ASSERT", "terminate called", "what():")
    lines = [line for line in log.splitlines() if any(mark in line for mark in marks)]
    line = next((line for line in lines if "SUMMARY:" not in line), lines[0] if lines else "")
    return re.sub(r"0x[0-9a-f]+|==\d+==|/\S*/", "", line).strip()[:200]
