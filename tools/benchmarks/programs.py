"""llama.cpp's own programs as anchors: batched-bench for generation, cvector-generator for reading."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import BenchError
from benchmarks.setting import Setting

BATCHED_BENCH, CVECTOR_GENERATOR = "llama-batched-bench", "llama-cvector-generator"
NOT_BUILT = "not built"
_ALL_LAYERS = 999
_CELLS = 256  # llama.cpp rounds the cells of a sequence up to a multiple of this (src/llama-context.cpp)
_MICRO_BATCH = 512  # llama.cpp's own default


class ProgramError(BenchError):
    """A program of llama.cpp failed or wrote something else than was expected."""


@dataclass(frozen=True)
class Program:
    """A program of llama.cpp, ready to be run on the model of a setting."""

    path: Path
    setting: Setting

    @property
    def version(self) -> str:
        """The first line that it says of itself."""
        done = subprocess.run([str(self.path), "--version"], capture_output=True, text=True, check=False)
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version")]
        return lines[0].removeprefix("version:").strip() if lines else "unknown"

    def command(self, *arguments: object) -> list[str]:
        setting = self.setting
        n_gpu_layers = _ALL_LAYERS if setting.n_gpu_layers < 0 else setting.n_gpu_layers
        common = [
            "-m",
            setting.model,
            "-t",
            setting.n_threads,
            "-tb",
            setting.n_threads,
            "-ngl",
            n_gpu_layers,
        ]
        return [str(argument) for argument in (self.path, *common, *arguments)]


def find(setting: Setting, name: str) -> Program | None:
    """The program of that name, if it is built."""
    path = setting.llama_bin / (f"{name}.exe" if os.name == "nt" else name)
    return Program(path, setting) if path.is_file() else None


def batched_bench(program: Program, n_prompt: int, n_answer: int, n_parallel: int) -> float:
    """Tokens/s of so many answers at once, the time of their prompts included; sequences share nothing."""
    cells = -(-(n_prompt + n_answer) // _CELLS) * _CELLS
    command = program.command(
        *("-c", n_parallel * cells, "-b", _MICRO_BATCH, "-ub", _MICRO_BATCH),
        *("-npp", n_prompt, "-ntg", n_answer, "-npl", n_parallel, "--output-format", "jsonl"),
    )
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or len(rows) != 1:
        raise ProgramError(f"{program.path} ended with {done.returncode}: {done.stderr[-500:]}")
    return n_parallel * n_answer / float(json.loads(rows[0])["t"])


def cvector_generator(program: Program, prompts: Sequence[str]) -> float:
    """Tokens/s of reading the prompts, every other one as a negative of the one before it.

    Timed from the first prompt to the last: neither loading nor what is made of the activations counts.
    It pads the two of a pair to the same length; these tokens count as read.
    """
    with tempfile.TemporaryDirectory() as folder:
        positive, negative = Path(folder) / "positive.txt", Path(folder) / "negative.txt"
        for path, lines in ((positive, prompts[0::2]), (negative, prompts[1::2])):
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = program.command(
            *("--positive-file", positive, "--negative-file", negative, "--method", "mean"),
            *("-o", Path(folder) / "out.gguf", "-b", _MICRO_BATCH, "-ub", _MICRO_BATCH, "-c", _MICRO_BATCH),
        )
        printed = _timed_lines(command)
    n_tokens: int | None = None
    began: float | None = None
    ended: float | None = None
    for when, line in printed:
        if match := re.search(r"n_total_tokens: (\d+)", line):
            n_tokens, began = int(match[1]), when
        elif line.startswith("Done evaluate prompts"):
            ended = when
    if n_tokens is None or began is None or ended is None or ended <= began:
        raise ProgramError(f"{program.path} failed: {' / '.join(line for _, line in printed[-3:])}")
    return n_tokens / (ended - began)


def _timed_lines(command: Sequence[str]) -> list[tuple[float, str]]:
    """The lines that a program prints, and when; to a terminal of its own, since to a pipe they come late."""
    import pty

    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            command, stdout=theirs, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
    finally:
        os.close(theirs)
    lines: list[tuple[float, str]] = []
    rest = b""
    with os.fdopen(ours, "rb", buffering=0) as output, process:
        while True:
            try:
                read = output.read(4096)
            except OSError:  # what Linux says at the end of a terminal
                break
            if not read:
                break
            when = time.perf_counter()
            *whole, rest = (rest + read).split(b"\n")
            lines += [(when, line.decode("utf-8", "replace").strip()) for line in whole]
    return lines
