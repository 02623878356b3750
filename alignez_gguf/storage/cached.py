"""Files that are computed once: each has a checksum beside it, in the form of `sha256sum`.

A file that does not agree with its checksum is computed again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

from alignez_gguf.errors import WorkDirectoryError
from alignez_gguf.storage.atomic import replacing


def cached_bytes(path: Path, make: Callable[[], bytes]) -> bytes:
    """Return the content of a file; `make` computes it where the file is missing or damaged.

    Raises:
        WorkDirectoryError: the file cannot be read or written.
    """
    content = _intact_content(path)
    if content is None:
        content = make()
        # The checksum first: a file without one that agrees is never taken for whole.
        _write(_checksum_path(path), _checksum_line(path, content))
        _write(path, content)
    return content


def _intact_content(path: Path) -> bytes | None:
    """Return the content of a file as it was written, or `None` where the file is missing or damaged."""
    if not path.exists():
        return None
    try:
        content, checksum = path.read_bytes(), _checksum_path(path)
        if checksum.exists() and checksum.read_bytes() == _checksum_line(path, content):
            return content
    except OSError as error:
        raise WorkDirectoryError.of("keep", path, error) from error
    warnings.warn(f"{path} is damaged and is made again; check the disk", stacklevel=4)
    return None


def _write(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise WorkDirectoryError.of("keep", path, error) from error


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum_line(path: Path, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()
