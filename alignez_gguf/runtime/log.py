"""What llama.cpp writes to its log while it works for us.

llama.cpp returns a bare status and says the reason in its log, so the reason has to be caught there.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT: goes on with the line before


@dataclass(eq=False)
class CapturedLog:
    """The error lines of llama.cpp, in order."""

    errors: list[str] = field(default_factory=list)
    _level: int = 0
    """The level of the line that is being written."""

    def reason(self) -> str:
        """The first error, which is the cause of those that follow it."""
        return self.errors[0].strip() if self.errors else "llama.cpp gave no reason"

    def receive(self, level: int, text: bytes) -> None:
        """Take a piece of the log, as llama.cpp hands it out."""
        continued = level == _CONTINUED
        self._level = self._level if continued else level
        if self._level != _ERROR:
            return
        line = text.decode("utf-8", errors="replace")
        if continued and self.errors:
            self.errors[-1] += line
        else:
            self.errors.append(line)


@contextmanager
def captured_log() -> Iterator[CapturedLog]:
    """Keep llama.cpp's log of this thread away from the terminal and collect its errors.

    Other threads go on as before: each captures its own log, and what nobody captures goes where it went.
    """
    log = CapturedLog()
    logs = _logs_of_thread()
    _begin()
    logs.append(log)
    try:
        yield log
    finally:
        logs.remove(log)
        _end()


_thread = threading.local()
_lock = threading.Lock()
_n_captures = 0
_callback: Any = None
"""llama.cpp has one callback per process, and may be about to call it in any thread, so it is never freed."""
_former: Any = None
_former_data: Any = None


def _logs_of_thread() -> list[CapturedLog]:
    logs: list[CapturedLog] | None = getattr(_thread, "logs", None)
    if logs is None:
        logs = _thread.logs = []
    return logs


def _receive(level: int, text: bytes, _: object) -> None:
    logs = _logs_of_thread()
    if logs:
        logs[-1].receive(level, text)
    elif _former:
        _former(level, text, _former_data)


def _begin() -> None:
    """Put our callback in the place of the one that is there."""
    import llama_cpp

    global _n_captures, _callback, _former, _former_data
    with _lock:
        if _callback is None:
            _callback = llama_cpp.llama_log_callback(_receive)
        current, data = _current()
        if _address(current) != _address(_callback):
            _former, _former_data = current, data
            llama_cpp.llama_log_set(_callback, ctypes.c_void_p())
        _n_captures += 1


def _end() -> None:
    """Give the place back after the last capture, unless somebody else has taken it meanwhile."""
    import llama_cpp

    global _n_captures
    with _lock:
        _n_captures -= 1
        if _n_captures == 0 and _address(_current()[0]) == _address(_callback):
            llama_cpp.llama_log_set(_former, _former_data)


def _current() -> tuple[Any, ctypes.c_void_p]:
    import llama_cpp

    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return callback, data


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
