"""Runs the command line in processes that start at once: a server that has imported everything forks them.

Each process is one of its own, to be killed like any other. What befalls it is set up before the command
begins: see `Fault`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

TOOLS = Path(__file__).resolve().parents[1]
_CHUNK = 4
"""Queries whose pairs are generated together, so that a run of a few has several stages."""


@dataclass(frozen=True)
class Fault:
    """What befalls a process.

    An event is a change in its folder: a file opened to be written, renamed or cut, a folder made, data
    forced to the disk.

    Attributes:
        at_event: the first event that is hit, counted from 1; 0 for none.
        errno: with which that event and all later ones fail; 0 for none.
        signal: that the process sends itself at that event; 0 for none.
        file_bytes: no file may grow beyond this size; -1 for any.
        clock_jumps: whether the clock jumps years with every look at it.
    """

    at_event: int = 0
    errno: int = 0
    signal: int = 0
    file_bytes: int = -1
    clock_jumps: bool = False


NO_FAULT = Fault()


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal, and what it said on standard error."""

    status: int
    stderr: str


class Forking:
    """A server, and its one process at a time. A context manager."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TOOLS), *sys.path])}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "fuzz.forking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )
        self.pid = 0

    def start(self, arguments: Sequence[str], folder: Path, fault: Fault = NO_FAULT) -> None:
        """Begin a command with `folder` as its working directory."""
        self._say({"arguments": list(arguments), "folder": str(folder), "fault": asdict(fault)})
        self.pid = int(self._heard())

    def end(self) -> Ended:
        """Wait for the end of the process."""
        self._say({})
        return Ended(**json.loads(self._heard()))

    def run(self, arguments: Sequence[str], folder: Path, fault: Fault = NO_FAULT) -> Ended:
        self.start(arguments, folder, fault)
        return self.end()

    def __enter__(self) -> Forking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        print(json.dumps(message), file=self._server.stdin, flush=True)

    def _heard(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


def serve() -> None:
    """Fork a process for each line of JSON, say its number, and, when asked, how it ended."""
    import alignez_gguf.cli.convert
    import alignez_gguf.cli.evaluate
    import alignez_gguf.cli.export
    import alignez_gguf.cli.generate
    import alignez_gguf.cli.pairs
    import alignez_gguf.engines.llama.engine
    import alignez_gguf.evaluation.report
    import alignez_gguf.evaluation.run
    import alignez_gguf.exporters.merged
    import alignez_gguf.pipeline
    import alignez_gguf.predict  # noqa: F401

    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(writing, 2)
            _become(**json.loads(line))
        os.close(writing)
        print(pid, flush=True)
        sys.stdin.readline()
        with os.fdopen(reading, encoding="utf-8", errors="replace") as said:
            stderr = said.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, "stderr": stderr}), flush=True)


def _become(arguments: list[str], folder: str, fault: dict[str, Any]) -> None:
    """Run the command in this process, and end it."""
    from alignez_gguf.cli import main
    from alignez_gguf.pairs import generation

    os.chdir(folder)
    for number in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    generation._CHUNK = _CHUNK
    _befall(Fault(**fault), folder)
    status = 0
    try:
        main(arguments, prog_name="alignez-gguf")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    os._exit(status)


def _befall(fault: Fault, folder: str) -> None:
    import resource
    import time
    from random import Random

    if fault.file_bytes >= 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, fault.file_bytes))
    if fault.clock_jumps:
        random, now = Random(0), time.time()
        time.time = lambda: now + random.uniform(-3e8, 3e8)
    n_events = 0

    def hit() -> None:
        nonlocal n_events
        n_events += 1
        if n_events == fault.at_event and fault.signal:
            os.kill(os.getpid(), fault.signal)
        if n_events >= fault.at_event and fault.errno:
            raise OSError(fault.errno, os.strerror(fault.errno))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.mkdir", "os.truncate")
        if (
            changes
            and isinstance(arguments[0], str | bytes)
            and str(Path(os.fsdecode(arguments[0])).absolute()).startswith(folder)
        ):
            hit()

    # A killed process loses nothing that it has written: to wait for the disk would prove nothing.
    os.fsync = lambda _: hit()  # type: ignore[assignment]
    if fault.at_event:
        sys.addaudithook(watch)


if __name__ == "__main__":
    serve()
