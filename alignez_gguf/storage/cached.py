"""What a work directory keeps, so that nothing is computed twice.

Beside every file lies its checksum, in the form of `sha256sum`; a file that does not agree with it is made
again.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.errors import WorkDirectoryError
from alignez_gguf.storage.atomic import replacing
from alignez_gguf.storage.journal import Journal

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def kept_json(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returned when it was called first, now or in an earlier run, as JSON gives it back.

    Raises:
        WorkDirectoryError: the file cannot be read or written.
    """
    return json.loads(_kept(path, lambda: json.dumps(make()).encode()))


def kept_array(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The same for an array."""

    def encoded() -> bytes:
        np.save(buffer := io.BytesIO(), make())
        return buffer.getvalue()

    array: NDArray[Any] = np.load(io.BytesIO(_kept(path, encoded)))
    return array


def kept_arrays(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The same for arrays by name."""

    def encoded() -> bytes:
        np.savez(buffer := io.BytesIO(), **make())
        return buffer.getvalue()

    with np.load(io.BytesIO(_kept(path, encoded))) as stored:
        return {name: stored[name] for name in stored.files}


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


def _kept(path: Path, make: Callable[[], bytes]) -> bytes:
    content = _intact(path)
    if content is None:
        content = make()
        # The checksum first: a file without one that agrees is never taken for whole.
        _write(_seal_of(path), _sealed(path, content))
        _write(path, content)
    return content


def _intact(path: Path) -> bytes | None:
    """The content of a file as it was written; `None` where there is none."""
    if not path.exists():
        return None
    try:
        content, seal = path.read_bytes(), _seal_of(path)
        if seal.exists() and seal.read_bytes() == _sealed(path, content):
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


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sealed(path: Path, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()
