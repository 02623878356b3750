"""Prompts that will be asked again: what was computed of them, in a temporary file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from io import FileIO

from alignez_gguf.atomic import write_all

_MOST_BYTES = 4 << 30
_FREE_SHARE = 0.25
"""No more than this share of what is free where temporary files lie."""


class PromptCache:
    """What was computed of prompts, found by their tokens.

    To lose one costs no more than to compute it again: where the disk is full or fails, nothing is raised.

    Args:
        limit: of all that is kept, in bytes. What would exceed it is not kept.
    """

    def __init__(self, limit: int = _MOST_BYTES) -> None:
        self._left = limit
        self._file: FileIO | None = None
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        """The offset and the size of what is kept of a prompt."""

    def __contains__(self, prompt: Sequence[int]) -> bool:
        return tuple(prompt) in self._places

    def keep(self, prompt: Sequence[int], state: bytes) -> None:
        """Keep what was computed of a prompt, if there is room."""
        if prompt in self or len(state) > self._left:
            return
        try:
            if self._file is None:
                free = shutil.disk_usage(tempfile.gettempdir()).free
                self._left = min(self._left, int(_FREE_SHARE * free))
                self._file = tempfile.TemporaryFile(buffering=0, prefix="alignez-")  # noqa: SIM115 (closed by `close`)
            offset = self._file.seek(0, os.SEEK_END)
            write_all(self._file, state)
        except OSError:
            self._left = 0
            return
        self._left -= len(state)
        self._places[tuple(prompt)] = offset, len(state)

    def find(self, prompt: Sequence[int]) -> bytes | None:
        """What was kept of a prompt, or None."""
        place = self._places.get(tuple(prompt))
        if place is None or self._file is None:
            return None
        offset, size = place
        try:
            self._file.seek(offset)
            state = self._file.read(size)
        except OSError:
            return None
        return state if len(state) == size else None

    def close(self) -> None:
        """Forget everything."""
        self._places.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
