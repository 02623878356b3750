"""A mapping that outlives its process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignez_gguf.storage.keyed_journal import KeyedJournal


@dataclass(frozen=True)
class Key:
    name: str
    layers: tuple[int, ...]


def opened(path: Path) -> KeyedJournal[Key, tuple[float, ...]]:
    def read_key(row: dict[str, Any]) -> Key:
        return Key(row["name"], tuple(row["layers"]))

    return KeyedJournal(path, "key", read_key, "value", tuple)


def test_entries_come_back_with_their_last_value(tmp_path: Path) -> None:
    first, second = Key("a", (1, 2)), Key("b", ())
    with opened(tmp_path / "entries.jsonl") as entries:
        entries[first] = (0.1, float("-inf"))
        entries[second] = ()
        entries[first] = (1e-300,)
        written = dict(entries)
    with opened(tmp_path / "entries.jsonl") as entries:
        assert dict(entries) == written == {first: (1e-300,), second: ()}


def test_value_is_what_would_be_read_again(tmp_path: Path) -> None:
    with KeyedJournal(tmp_path / "entries.jsonl", "key", str, "value", dict) as entries:
        entries["a"] = {"layers": (1, 2), "text": "\ud800"}
        written = entries["a"]
    with KeyedJournal(tmp_path / "entries.jsonl", "key", str, "value", dict) as entries:
        assert entries["a"] == written == {"layers": [1, 2], "text": "?"}


def test_entry_that_was_cut_off_is_missing_and_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "entries.jsonl"
    with opened(path) as entries:
        entries[Key("a", ())] = (1.0,)
        entries[Key("b", ())] = (2.0,)
    path.write_bytes(path.read_bytes()[:-5])
    with opened(path) as entries:
        assert dict(entries) == {Key("a", ()): (1.0,)}
        entries[Key("b", ())] = (3.0,)
    with opened(path) as entries:
        assert entries[Key("b", ())] == (3.0,)


def test_entries_cannot_be_deleted(tmp_path: Path) -> None:
    with opened(tmp_path / "entries.jsonl") as entries:
        entries[Key("a", ())] = (1.0,)
        with pytest.raises(TypeError, match="cannot be deleted"):
            del entries[Key("a", ())]
