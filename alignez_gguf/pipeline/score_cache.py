"""What a work directory keeps, so that nothing is computed twice.

Beside every file lies its checksum, in the form of `sha256sum`; a file that does not agree with it is made
again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignez_gguf.control.scope import Scope
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.selection.candidates import Candidate, Source
from alignez_gguf.selection.scoring import EditScore
from alignez_gguf.storage.cached import Known


def score_cache(path: Path) -> Known[Candidate, EditScore]:
    """Figures of candidates.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """
    return Known(path, "candidate", _candidate, "figures", edit_score_of)


def margin_cache(path: Path) -> Known[PreferencePair, tuple[float, float]]:
    """Margins of pairs, the helpful answer's and the harmful one's.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """
    return Known(path, "pair", lambda row: PreferencePair(**row), "margins", tuple)


def _candidate(row: dict[str, Any]) -> Candidate:
    parts = {"source": Source(**row["source"]), "scope": Scope(**row["scope"])}
    return Candidate(**{**_with_tuples(row), **parts})


def edit_score_of(row: dict[str, Any]) -> EditScore:
    return EditScore(**_with_tuples(row))


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its lists as what they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
