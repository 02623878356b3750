"""Write a file in full or not at all."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from io import FileIO
from pathlib import Path

from alignez_gguf.errors import OutputError

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` when the block succeeds.

    The data is on the disk before the rename, so a reader finds the old file or the new one, also after a
    crash. When the block fails, the temporary file is removed and `path` is as it was; one that a killed
    process left behind is removed by the next that writes to `path`.

    Raises:
        OSError: the folder is missing or not writable, or `path` exists and is not a plain file (a rename
            would put a plain file in the place of a device).
    """
    temporary = _temporary(path)
    _remove_abandoned(path)
    with _held(temporary):
        try:
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_all(file: FileIO, data: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in full or not at all. Raises `OutputError`."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unwritable(path, error) from error


def require_writable(path: Path) -> None:
    """Find out before the work that its result can be written. Raises `OutputError`."""
    try:
        temporary = _temporary(path)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _temporary(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise OSError("it is not a plain file")
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _held(temporary: Path) -> Iterator[None]:
    """Create a file, and lock it so that others see that its process is alive."""
    with temporary.open("xb") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose processes were killed: nobody holds their locks."""
    if sys.platform == "win32":
        return
    for other in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError), other.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other.unlink()


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}; choose another place for the output")
