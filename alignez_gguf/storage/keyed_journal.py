"""A dictionary on disk: every assignment is appended to a journal, so that a crash loses none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from alignez_gguf.closing import Closing
from alignez_gguf.storage.journal import Journal

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class KeyedJournal(Closing, MutableMapping[_Key, _Value]):
    """A mapping whose entries are rows of a `Journal`. A context manager; nothing can be deleted.

    A key that is assigned twice has its last value. Keys and values may be dataclasses or what JSON can hold.
    A value is the one that would be read again, so that a resumed run sees what an uninterrupted one saw.

    Args:
        path: the file; created where it is missing.
        key_field, value_field: names of the two fields of a row.
        read_key, read_value: make a key and a value of those fields as JSON gives them back.

    Raises:
        WorkDirectoryError: the file cannot be opened or, on assignment, written.
    """

    def __init__(
        self,
        path: Path,
        key_field: str,
        read_key: Callable[[Any], _Key],
        value_field: str,
        read_value: Callable[[Any], _Value],
    ) -> None:
        self._journal = Journal(path)
        self._key_field, self._value_field = key_field, value_field
        self._read_value = read_value
        self._entries = {read_key(row[key_field]): read_value(row[value_field]) for row in self._journal.rows}

    def close(self) -> None:
        self._journal.close()

    def __setitem__(self, key: _Key, value: _Value) -> None:
        row = self._journal.append({self._key_field: _as_json(key), self._value_field: _as_json(value)})
        self._entries[key] = self._read_value(row[self._value_field])

    def __getitem__(self, key: _Key) -> _Value:
        return self._entries[key]

    def __delitem__(self, key: _Key) -> None:
        raise TypeError("an entry of a journal cannot be deleted")

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _as_json(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
