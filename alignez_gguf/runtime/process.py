"""A long child process whose output is watched and logged, and which never outlives an interruption."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_GRACE_S = 2


def run_logged(
    command: Sequence[str], environment: Mapping[str, str], log: Path, receive: Callable[[str], None]
) -> int:
    """Run `command`, write its output to `log` and each line to `receive`; return its exit status.

    When this is interrupted, by Ctrl-C or by an exception of `receive`, the process and all that it started
    end before the exception goes on.
    """
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that compilers end with pip, whoever is interrupted
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                receive(line)
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and its group: asked first, since ninja passes it on to the compilers' own groups."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    for how in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
            while time.monotonic() < deadline:
                process.poll()  # a zombie would keep the group alive
                os.killpg(process.pid, 0)
                time.sleep(0.05)
