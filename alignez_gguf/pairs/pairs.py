"""Preference pairs, and the files that hold them; this module knows nothing of how they are generated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from alignez_gguf.closing import Closing
from alignez_gguf.errors import QueryError
from alignez_gguf.pairs import preferences
from alignez_gguf.prompts import tables
from alignez_gguf.storage.journal import Journal


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one query, each given under a persona with the characteristics beside it.

    Attributes:
        truncated: whether an answer was cut at the limit of tokens.
        sample: the number of the pair among those of its query, from 0.
        weight: how much the pair counts in a fit, relative to the others.
    """

    query: str
    helpful: str
    harmful: str
    helpful_characteristics: str = ""
    harmful_characteristics: str = ""
    truncated: bool = False
    sample: int = 0
    weight: float = 1.0


_TEXTS = ("query", "helpful", "harmful")
"""The fields without which there is no pair; those of `preferences.FIELDS` say the same, in this order."""


def unweighted(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return the pairs with weight 1, as a model sees them: weights matter in a fit alone."""
    return [replace(pair, weight=1.0) for pair in pairs]


class PairStore(Closing):
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
        """Store a pair.

        Raises:
            WorkDirectoryError: it cannot be written.
        """
        self._journal.append(asdict(pair))
        self.pairs.append(pair)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PreferencePair]:
        return iter(self.pairs)

    def close(self) -> None:
        self._journal.close()


def load_pairs(path: str | PathLike[str]) -> list[PreferencePair]:
    """Read pairs from a file in one of the forms that `tables.parse` knows.

    A row has our own fields query, helpful and harmful, perhaps with others of `PreferencePair`, or it has
    prompt, chosen and rejected, as texts or as lists of messages. Whichever three are complete are the pair,
    and every other field is ignored; where all six are there, they must agree.

    Raises:
        QueryError: the file cannot be read or holds no pairs, or a row is not a pair; the message has its
            line.
    """
    table = tables.load_table(path)
    pairs = []
    for record in table.rows:
        if not table.has_columns:
            raise QueryError(f"{record.where} is not JSON but text; {preferences.NEEDED}")
        pairs.append(_pair_of(record.fields, record.where))
    if not pairs:
        raise QueryError(f"{path} holds no pairs; write at least one")
    return pairs


def _pair_of(row: Mapping[str, Any], where: str) -> PreferencePair:
    own = {name: row[name] for name in _TEXTS if isinstance(row.get(name), str)}
    is_foreign = {"chosen", "rejected"} <= row.keys()
    if len(own) < len(_TEXTS):
        n_foreign = sum(name in row for name in preferences.FIELDS)
        if is_foreign or n_foreign > sum(name in row for name in _TEXTS):
            return PreferencePair(*preferences.read_preference(row, where))
        raise preferences.missing(next(name for name in _TEXTS if name not in own), where)
    if is_foreign:
        _check_agreement(row, where)
    pair = PreferencePair(**own, **{field.name: _value(field, row, where) for field in _FURTHER})
    if not (math.isfinite(pair.weight) and pair.weight > 0):
        raise QueryError(f"{where}: the weight is {pair.weight}; give a finite number above 0")
    return pair


def _check_agreement(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row with our own three fields where the three foreign ones are a pair too, and another one."""
    try:
        foreign = preferences.read_preference(row, where)
    except QueryError:  # they are no pair
        return
    for name, foreign_name, text in zip(_TEXTS, preferences.FIELDS, foreign, strict=True):
        if row[name].strip() != text.strip():
            raise QueryError(
                f"{where}: `{name}` and `{foreign_name}` contradict each other; leave one of them out"
            )


_FURTHER = [field for field in fields(PreferencePair) if field.default is not MISSING]


def _value(field: Field[Any], row: Mapping[str, Any], where: str) -> Any:
    """Read a field that a row may leave out; a CSV file has it as a text."""
    value, kind = row.get(field.name), type(field.default)
    if value is None or (value == "" and kind is not str):
        return field.default
    if isinstance(value, str) and kind is not str:
        value = _parsed(value, kind)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise QueryError(f"{where} has no {kind.__name__} `{field.name}`; correct it, or leave it out")
    return value


def _parsed(text: str, kind: type) -> object:
    try:
        return tables.truth(text) if kind is bool else kind(text)
    except ValueError:
        return None
