"""Write a file in full or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` when the block succeeds.

    The data is on the disk before the rename, so a reader finds the old file or the new one, also after a
    crash. When the block fails, the temporary file is removed and `path` is as it was.

    Raises:
        OSError: the folder is missing or not writable, or `path` exists and is not a plain file (a rename
            would put a plain file in the place of a device).
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a plain file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
