"""Faults while the commands run: killed, interrupted, no room, a clock that jumps, a damaged work directory.

Whatever happens, nothing half-written stands under a final name, a failure is one line that says so, and the
same command, given again, ends with the bytes of an undisturbed run and leaves nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.model_info import ModelInfo
from fuzz import Outcome, Scale
from fuzz.forking import Ended, Fault, Forking

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MAX_EVENT = 12
"""Events that a process gets through at most before a fault."""
_SHARE = 5
"""One fault of another kind for so many kills."""
_FIVE = ("export", "pairs", "evaluate", "convert", "generate")


@dataclass(frozen=True)
class Command:
    """A command, and the files that it leaves in its folder when it has ended undisturbed."""

    arguments: tuple[str, ...]
    files: dict[str, bytes]
    seconds: float
    """That it takes."""

    @property
    def name(self) -> str:
        return self.arguments[0]


def stress(scale: Scale, folder: Path) -> Sequence[Outcome]:
    """Every command is killed `scale.kills` times, and meets a share of that of every other fault."""
    random, others = Random(scale.seed), -(-scale.kills // _SHARE)
    with Forking() as processes:
        commands = undisturbed(processes, folder)
        batter = Battery(processes, folder, random)
        return (
            *(batter.killed(command, scale.kills) for command in commands),
            batter.out_of_room(commands, others),
            batter.files_limited(commands, others),
            batter.interrupted(commands, others),
            batter.clock_jumped(commands),
            batter.damaged(commands, others),
        )


def undisturbed(processes: Forking, folder: Path, names: Sequence[str] = _FIVE) -> list[Command]:
    """The commands over the demo model, small enough to take seconds, and what they make."""
    commands = []
    processes.run(("--help",), folder)  # it answers once everything is imported
    for arguments in _commands(folder):
        if arguments[0] in names:
            place = folder / f"undisturbed-{arguments[0]}"
            place.mkdir()
            started = time.monotonic()
            ended = processes.run(arguments, place)
            if ended.status:
                raise RuntimeError(f"{arguments[0]} fails undisturbed: {ended.stderr}")
            commands.append(Command(arguments, contents(place), time.monotonic() - started))
    return commands


def _commands(folder: Path) -> Iterator[tuple[str, ...]]:
    texts = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()
    queries, labelled, control = folder / "queries.txt", folder / "labelled.jsonl", folder / "control.gguf"
    queries.write_text("\n".join(texts[:48]), encoding="utf-8")
    rows = [{"query": text, "harmful": number % 2 == 0} for number, text in enumerate(texts[:6])]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    info = ModelInfo.from_gguf(demo.MODEL)
    directions = np.random.default_rng(0).standard_normal((2, info.n_embd))
    edits = {1: LayerEdit(remove=directions[0]), 2: LayerEdit(remove=directions[1])}
    ControlFile(info, edits).save(control)
    model, steered, short = str(demo.MODEL), ("-c", str(control)), ("--max-tokens", "16")
    quick = (
        *("--method", "mean", "--read", "prompt", "--hook", "mlp"),
        *("--scope", "generation", "--kl-budget", "1"),
    )
    run = ("--quiet", "--threads", "1")
    yield ("pairs", model, "-q", str(queries), "-o", "out.jsonl", *short, *run)
    yield ("export", model, "-q", str(queries), "-o", "out.gguf", *short, *quick, *run)
    yield ("evaluate", "--base", model, *steered, "-q", str(labelled), "-o", "out.html", *short, *run)
    yield ("convert", str(control), model, "--format", "merged", "-o", "out.gguf", "--quiet")
    yield (
        "generate",
        model,
        *steered,
        "--prompts",
        str(queries),
        "--compare",
        "-o",
        "out.jsonl",
        *short,
        *run,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Battery:
    """Runs commands under faults, again and again in one folder until they complete; then in a new one."""

    def __init__(self, processes: Forking, folder: Path, random: Random) -> None:
        self._processes = processes
        self._folder = folder
        self._random = random
        self._n_folders = 0

    def killed(self, command: Command, kills: int) -> Outcome:
        """SIGKILL at random moments."""

        def run(place: Path) -> Ended:
            self._processes.start(command.arguments, place)
            time.sleep(self._random.uniform(0, min(command.seconds, 2.5)))
            os.kill(self._processes.pid, signal.SIGKILL)
            return self._processes.end()

        findings = self._again_and_again(command, kills, run, _was_killed)
        return Outcome(f"killed: {command.name}", kills, tuple(findings), kind="faults")

    def out_of_room(self, commands: Sequence[Command], count: int) -> Outcome:
        """From some event on, the disk is full, the quota used up, or the file system read-only."""

        def fault() -> Fault:
            code = self._random.choice(_NO_ROOM)
            return Fault(at_event=self._random.randint(1, _MAX_EVENT), errno=code)

        return self._faulted("no room, quota, read-only", commands, count, fault, _failed_in_one_line)

    def files_limited(self, commands: Sequence[Command], count: int) -> Outcome:
        """No file may grow beyond a random size: real writes fail, also those of libraries."""

        def fault() -> Fault:
            return Fault(file_bytes=int(10 ** self._random.uniform(0, 4)))

        return self._faulted("files cut short", commands, count, fault, _failed_in_one_line)

    def interrupted(self, commands: Sequence[Command], count: int) -> Outcome:
        """SIGINT at some event."""

        def fault() -> Fault:
            return Fault(at_event=self._random.randint(1, _MAX_EVENT), signal=signal.SIGINT)

        return self._faulted("interrupted", commands, count, fault, _was_interrupted)

    def clock_jumped(self, commands: Sequence[Command]) -> Outcome:
        """The clock jumps years with every look, and what an interrupted run left is from the future."""
        findings: list[str] = []
        for command in commands:
            place = self._new_folder()
            self._processes.run(command.arguments, place, Fault(at_event=_MAX_EVENT, signal=signal.SIGKILL))
            for path in place.rglob("*"):
                os.utime(path, (2e9, 2e9))
            ended = self._processes.run(command.arguments, place, Fault(clock_jumps=True))
            findings += _not_as_undisturbed(command, place, ended)
        return Outcome("clock jumps", len(commands), tuple(findings), kind="faults")

    def damaged(self, commands: Sequence[Command], count: int) -> Outcome:
        """A file of the work directory has a flipped bit or a lost end: only that part is made again."""
        findings: list[str] = []
        resumable = [command for command in commands if command.name != "convert"]
        for command in resumable:
            findings += self._damaged(command, count)
        return Outcome("damaged work directory", count * len(resumable), tuple(findings), kind="faults")

    def _damaged(self, command: Command, count: int) -> list[str]:
        place = self._new_folder()
        resumed = Command((*command.arguments, "--work-dir", "work"), command.files, command.seconds)
        findings = _failure(self._processes.run(resumed.arguments, place))
        work, spoiled = place / "work", set[str]()
        for _ in range(count):
            parts = sorted(path for path in _stamps(work) if path.stat().st_size)
            damaged = self._random.choice(parts)
            what = _damage(damaged, self._random)
            spoiled.add(damaged.name.removesuffix(".sha256"))  # for as long as nobody looks at it
            if damaged.name.startswith("activations-"):  # nobody looks at them while there is a fit
                for fit in work.glob("directions-*"):
                    fit.unlink()
            for output in resumed.files:
                (place / output).unlink()
            before = _stamps(work)
            ended = self._processes.run(resumed.arguments, place)
            said = f"{command.name}, {damaged.name} {what}"
            if ended.status or "Traceback" in ended.stderr:
                findings.append(f"{said}: {ended.status}, {ended.stderr.strip()[-300:]}")
                break
            redone = {path for path, stamp in before.items() if path.exists() and _stamp(path) != stamp}
            beside = {path for path in redone if path.name.removesuffix(".sha256") not in spoiled}
            if beside:
                findings.append(f"{said}: {', '.join(sorted(path.name for path in beside))} was redone too")
            if {name: (place / name).read_bytes() for name in resumed.files} != resumed.files:
                findings.append(f"{said}: other bytes than an undisturbed run")
        return findings

    def _faulted(
        self,
        name: str,
        commands: Sequence[Command],
        count: int,
        fault: Callable[[], Fault],
        expected: Callable[[Ended], str],
    ) -> Outcome:
        findings: list[str] = []
        for command in commands:

            def run(place: Path, arguments: tuple[str, ...] = command.arguments) -> Ended:
                return self._processes.run(arguments, place, fault())

            findings += self._again_and_again(command, count, run, expected)
        return Outcome(name, count * len(commands), tuple(findings), kind="faults")

    def _again_and_again(
        self, command: Command, count: int, run: Callable[[Path], Ended], expected: Callable[[Ended], str]
    ) -> list[str]:
        """Until `count` runs did not complete; `expected` says what is wrong with such an end."""
        findings: list[str] = []
        place, n_faults = self._new_folder(), 0
        for _ in range(20 * count):
            if n_faults == count:
                break
            ended = run(place)
            if ended.status == 0:
                findings += _not_as_undisturbed(command, place, ended)
                place = self._new_folder()
                continue
            n_faults += 1
            wrong = expected(ended) or _half_written(command, place)
            if wrong:
                findings.append(f"{command.name}: {wrong}")
        ended = self._processes.run(command.arguments, place)
        return findings + _not_as_undisturbed(command, place, ended)

    def _new_folder(self) -> Path:
        shutil.rmtree(self._folder / f"run-{self._n_folders}", ignore_errors=True)
        self._n_folders += 1
        place = self._folder / f"run-{self._n_folders}"
        place.mkdir()
        return place


def _was_killed(ended: Ended) -> str:
    return "" if ended.status == -signal.SIGKILL else f"status {ended.status}: {ended.stderr[-300:]}"


def _failed_in_one_line(ended: Ended) -> str:
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("Warning: ")]
    if ended.status == 1 and len(lines) == 1 and lines[0].startswith("Error: "):
        return ""
    return f"status {ended.status}: {ended.stderr.strip()[-300:]}"


def _was_interrupted(ended: Ended) -> str:
    said = ended.stderr.strip()
    if ended.status in (1, 130) and "Traceback" not in said and ("goes on from" in said or "Aborted" in said):
        return ""
    return f"status {ended.status}: {said[-300:]}"


def _half_written(command: Command, place: Path) -> str:
    """An output that is there, but not whole."""
    for name, whole in command.files.items():
        path = place / name
        if path.exists() and path.read_bytes() != whole:
            return f"{name} is not whole"
    return ""


def _failure(ended: Ended) -> list[str]:
    return [f"status {ended.status}: {ended.stderr.strip()[-300:]}"] if ended.status else []


def _not_as_undisturbed(command: Command, place: Path, ended: Ended) -> list[str]:
    if ended.status:
        return [f"{command.name} does not complete: {ended.stderr.strip()[-300:]}"]
    found = contents(place)
    if found != command.files:
        wrong = sorted(
            name for name in {*found, *command.files} if found.get(name) != command.files.get(name)
        )
        return [f"{command.name} completes with other files than an undisturbed run: {', '.join(wrong)}"]
    return []


def _damage(path: Path, random: Random) -> str:
    data = bytearray(path.read_bytes())
    if random.random() < 0.3:
        path.write_bytes(data[: random.randrange(len(data))])
        return "cut"
    place = random.randrange(len(data))
    data[place] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return f"with a flipped bit at {place} of {len(data)}"


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Of the parts in a work directory; what was put aside is none."""
    parts = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".damaged")
    return {path: _stamp(path) for path in parts}
