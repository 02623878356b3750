"""What llama.cpp writes to its log while it works for us.

llama.cpp returns a bare status and says the reason in its log, so the reason has to be caught there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT: goes on with the line before


@dataclass
class CapturedLog:
    """The error lines of llama.cpp, in order."""

    errors: list[str] = field(default_factory=list)

    def reason(self) -> str:
        """The first error, which is the cause of those that follow it."""
        return self.errors[0].strip() if self.errors else "llama.cpp gave no reason"


@contextmanager
def captured_log() -> Iterator[CapturedLog]:
    """Keep llama.cpp's log away from the terminal and collect its errors.

    The callback is one per process (`llama_log_set` in src/llama.cpp), so this belongs around short calls
    that load, create or set something, not around decoding.
    """
    import llama_cpp

    log = CapturedLog()
    previous_level = 0

    def receive(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        nonlocal previous_level
        continued = level == _CONTINUED
        level = previous_level if continued else level
        previous_level = level
        if level != _ERROR:
            return
        line = text.decode("utf-8", errors="replace")
        if continued and log.errors:
            log.errors[-1] += line
        else:
            log.errors.append(line)

    callback = llama_cpp.llama_log_callback(receive)
    former, former_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(former_data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield log
    finally:
        llama_cpp.llama_log_set(former, former_data)
