"""An append-only file of JSON rows with checksums, by which what a crash or a bad disk spoiled is known.

A row is one line, `{..., "sha256": "0123456789abcdef"}`: the first 16 digits of the SHA-256 of the row
without that field. So the file is JSONL to everybody else. What the rows mean is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignez_gguf.closing import Closing
from alignez_gguf.errors import WorkDirectoryError
from alignez_gguf.storage.atomic import replacing, write_all

_DIGITS = 16
_SEAL = b', "sha256": "%s"}'
_SEAL_LENGTH = len(_SEAL % bytes(_DIGITS))


class Journal(Closing):
    """The rows of a file, and a place for more of them. A context manager.

    Opening drops a last line that was cut off, and every row that is not as it was written; of a file with
    such rows a copy stays behind, with `.damaged` after its name. One process at a time may use a file.

    Raises:
        WorkDirectoryError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        """All intact rows, in the order in which they were written."""
        try:
            self._load()
            # Unbuffered: no half of a row that could not be written is tried again when the file closes.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise WorkDirectoryError.of("open", path, error) from error

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Add a row, and return it as it will be read again; it is on the disk when this returns.

        Text that is not Unicode is stored with replacements.

        Raises:
            WorkDirectoryError: the row cannot be written.
        """
        line = _sealed(row)
        try:
            write_all(self._file, line + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise WorkDirectoryError.of("write", self.path, error) from error
        stored = _opened(line)
        assert stored is not None
        self.rows.append(stored)
        return stored

    def close(self) -> None:
        self._file.close()

    def _load(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        *lines, cut_off = data.split(b"\n")
        opened = [_opened(line) for line in lines]
        self.rows = [row for row in opened if row is not None]
        n_damaged = len(lines) - len(self.rows)
        if n_damaged:
            warnings.warn(
                f"{self.path} has {n_damaged} damaged rows, which are made again; check the disk",
                stacklevel=3,
            )
            with replacing(self.path.with_name(f"{self.path.name}.damaged")) as copy:
                copy.write_bytes(data)
        if n_damaged or cut_off:
            with replacing(self.path) as whole:
                kept = [line for line, row in zip(lines, opened, strict=True) if row is not None]
                whole.write_bytes(b"".join(line + b"\n" for line in kept))


def _sealed(row: Mapping[str, Any]) -> bytes:
    body = json.dumps(dict(row), ensure_ascii=False).encode("utf-8", "replace")
    return body[:-1] + _SEAL % _digest(body)


def _opened(line: bytes) -> dict[str, Any] | None:
    """The row of a line; `None` where the line is not as it was written."""
    body = line[:-_SEAL_LENGTH] + b"}"
    if line[-_SEAL_LENGTH:] != _SEAL % _digest(body):
        return None
    row: dict[str, Any] = json.loads(body)
    return row


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_DIGITS].encode()
