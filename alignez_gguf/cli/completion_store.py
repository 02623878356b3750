"""Completions as they come in, in a file that outlives an interruption."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from alignez_gguf.closing import Closing
from alignez_gguf.engines.base import Completion
from alignez_gguf.storage.journal import Journal


class CompletionStore(Closing):
    """An append-only file of completions by the number of their request. A context manager.

    Raises:
        WorkDirectoryError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)
        self.found: dict[int, Completion] = {}
        """All completions that are stored."""
        for row in self._journal.rows:
            self._take(**row)

    def add(self, index: int, completion: Completion) -> None:
        """Store a completion; it is on the disk when this returns. Raises `WorkDirectoryError`."""
        self._take(**self._journal.append({"index": index, **asdict(completion)}))

    def close(self) -> None:
        self._journal.close()

    def _take(self, index: int, **fields: object) -> None:
        self.found[index] = Completion(**fields)  # type: ignore[arg-type]
