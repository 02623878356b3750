"""A long child process whose output is watched and logged, and which never outlives an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


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
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            raise
