"""Files that are computed once: each has a checksum beside it, in the form of `sha256sum`.

A file that does not agree with its checksum is computed again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from alignez_gguf.errors import WorkDirectoryError
from alignez_gguf.storage.atomic import replacing
from alignez_gguf.storage.journal import Journal

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


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


class Known(MutableMapping[_Key, _Value]):
    """What is known of keys, in a file to which each new one is appended. A context manager.

    Args:
        path: the file.
        key_name, value_name: of the fields of a row.
        key, value: make such a field, as JSON gives it back, what it was.
    """

    def __init__(
        self,
        path: Path,
        key_name: str,
        key: Callable[[Any], _Key],
        value_name: str,
        value: Callable[[Any], _Value],
    ) -> None:
        self._journal = Journal(path)
        self._names = key_name, value_name
        self._found = {key(row[key_name]): value(row[value_name]) for row in self._journal.rows}

    def __enter__(self) -> Known[_Key, _Value]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()

    def __setitem__(self, key: _Key, value: _Value) -> None:
        self._found[key] = value
        self._journal.append(dict(zip(self._names, map(_as_json, (key, value)), strict=True)))

    def __getitem__(self, key: _Key) -> _Value:
        return self._found[key]

    def __delitem__(self, key: _Key) -> None:
        raise TypeError("what is known is kept")

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _as_json(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


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
