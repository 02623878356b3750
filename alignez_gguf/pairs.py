"""Preference pairs: what they are and where they are kept.

Rows are JSON, one per line. This module knows nothing of how pairs are generated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from alignez_gguf.errors import QueryError
from alignez_gguf.journal import Journal


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one query, each given under a persona with the characteristics beside it.

    Attributes:
        truncated: an answer was cut at the limit of tokens.
        sample: counts the pairs of one query from 0.
        weight: how much the pair counts in a fit, next to others.
    """

    query: str
    helpful: str
    harmful: str
    helpful_characteristics: str = ""
    harmful_characteristics: str = ""
    truncated: bool = False
    sample: int = 0
    weight: float = 1.0


_FOREIGN_FIELDS = {"prompt": "query", "chosen": "helpful", "rejected": "harmful"}
"""The names that data sets for preference optimisation use."""


def unweighted(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs as a model sees them: how much each counts decides nothing but a fit."""
    return [replace(pair, weight=1.0) for pair in pairs]


class PairStore:
    """An append-only file of pairs that survives a crash: what `append` returned from is on the disk.

    Opening drops what is not as it was written; see `Journal`. One process at a time may append.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._journal = Journal(self.path)
        self.pairs = [_pair_of(row, str(self.path)) for row in self._journal.rows]

    def append(self, pair: PreferencePair) -> None:
        """Store a pair. Raises `WorkDirectoryError` where it cannot be written."""
        self._journal.append(asdict(pair))
        self.pairs.append(pair)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PreferencePair]:
        return iter(self.pairs)

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> PairStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load_pairs(path: str | PathLike[str]) -> list[PreferencePair]:
    """Read pairs from a JSONL file of ours, or one with the fields prompt, chosen and rejected.

    Raises:
        QueryError: the file cannot be read, or a line is not a pair; the message has its number.
    """
    path = Path(path)
    pairs = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise QueryError(f"cannot read the pairs {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            pairs.append(_pair(line, f"{path}, line {number}"))
    return pairs


def _pair(line: bytes, where: str) -> PreferencePair:
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise QueryError(f"{where} is not UTF-8; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise QueryError(f"{where} is not JSON ({error}); write one object per line") from error
    if not isinstance(row, dict):
        raise QueryError(f"{where} is not a JSON object; write one object per line")
    return _pair_of(row, where)


def _pair_of(row: dict[str, Any], where: str) -> PreferencePair:
    named = {_FOREIGN_FIELDS.get(key, key): value for key, value in row.items()}
    known: dict[str, Any] = {}
    for field in fields(PreferencePair):
        value = named.get(field.name, field.default)
        kind = str if field.default is MISSING else type(field.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise QueryError(
                f"{where} has no {kind.__name__} `{field.name}`; "
                "a pair needs the fields query, helpful and harmful (or prompt, chosen and rejected)"
            )
        known[field.name] = value
    pair = PreferencePair(**known)
    if not (math.isfinite(pair.weight) and pair.weight > 0):
        raise QueryError(f"{where}: the weight is {pair.weight}; give a finite number above 0")
    return pair
