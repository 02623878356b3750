"""An append-only JSONL file of values under keys, in the work directory of an evaluation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from alignez_gguf.storage.keyed_journal import KeyedJournal


def key_of(*parts: object) -> str:
    """Return the key of a result that these parts determine."""
    return json_sha256(parts)[:32]


def json_sha256(content: object) -> str:
    """Return the SHA-256 of JSON content, in hex digits; the order of keys does not count."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class ResultStore(KeyedJournal[str, dict[str, Any]]):
    """The results of an evaluation: values that JSON can hold, by their `key_of`.

    Args:
        path: the file; created where it is missing.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "key", str, "value", dict)
