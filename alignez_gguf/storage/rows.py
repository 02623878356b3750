"""An append-only JSONL file of values under keys, in the work directory of an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignez_gguf.storage.journal import Journal


def key_of(*parts: object) -> str:
    """Return the key of a result that these parts determine."""
    return json_sha256(parts)[:32]


def json_sha256(content: object) -> str:
    """Return the SHA-256 of JSON content, in hex digits; the order of keys does not count."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ResultStore:
    """An append-only file: what `put` returned from is on the disk.

    A key that is put twice has its last value.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = Journal(path)
        self._values: dict[str, dict[str, Any]] = {row["key"]: row["value"] for row in self._journal.rows}

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._values[key]

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Store a value. Raises `WorkDirectoryError` where it cannot be written."""
        # As it would be read again, so that a resumed run sees what an uninterrupted one saw.
        self._values[key] = self._journal.append({"key": key, "value": dict(value)})["value"]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
