"""Scores of candidates and margins of pairs, cached on disk as they are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignez_gguf.control.scope import Scope
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.selection.candidates import Candidate, Source
from alignez_gguf.selection.scoring import EditScore
from alignez_gguf.storage.keyed_journal import KeyedJournal


def score_cache(path: Path) -> KeyedJournal[Candidate, EditScore]:
    """Open the cache of the scores of candidates.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """
    return KeyedJournal(path, "candidate", _candidate, "figures", edit_score_of)


def margin_cache(path: Path) -> KeyedJournal[PreferencePair, tuple[float, float]]:
    """Open the cache of the margins of pairs, of the helpful and of the harmful answer, in nat.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """
    return KeyedJournal(path, "pair", lambda row: PreferencePair(**row), "margins", tuple)


def edit_score_of(row: dict[str, Any]) -> EditScore:
    """Return the score whose fields JSON gave back."""
    return EditScore(**_with_tuples(row))


def _candidate(row: dict[str, Any]) -> Candidate:
    parts = {"source": Source(**row["source"]), "scope": Scope(**row["scope"])}
    return Candidate(**{**_with_tuples(row), **parts})


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with tuples in the place of its lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
