"""Caches the KV state of prompts that come again, in a temporary file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from io import FileIO

from alignez_gguf.storage.atomic import write_all

_MOST_BYTES = 4 << 30
_FREE_SHARE = 0.25
"""No more than this share of what is free where temporary files lie."""


class PrefixCache:
    """The state of sequences (`Context.save_sequence`), found by their tokens.

    A lost one is computed again: where the disk is full or fails, nothing is raised.

    Args:
        limit: the most bytes of all states together. One that would exceed it is not added.
    """

    def __init__(self, limit: int = _MOST_BYTES) -> None:
        self._left = limit
        self._file: FileIO | None = None
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        """The offset and the size of each state, by the tokens."""

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return tuple(tokens) in self._places

    def add(self, tokens: Sequence[int], state: bytes) -> None:
        """Write the state of a prompt to the file, if there is room."""
        if tokens in self or len(state) > self._left:
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
        self._places[tuple(tokens)] = offset, len(state)

    def find(self, tokens: Sequence[int]) -> bytes | None:
        """Return the state of a prompt, or None."""
        place = self._places.get(tuple(tokens))
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
