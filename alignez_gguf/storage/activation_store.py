"""What every layer makes of texts: layers x n_embd in float16 for each, in a file that grows.

Nothing is ever held in float32 for all layers. This module knows nothing of engines.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignez_gguf.errors import ModelFileError, WorkDirectoryError
from alignez_gguf.storage.atomic import write_all

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_DIGEST_BYTES = 16
_HEAD_BYTES = 2 * _DIGEST_BYTES
"""Before the values of a text: a digest of the text, and one of that and the values."""


class ActivationStore:
    """What is read of every layer for some texts, found by the text. One process at a time may use a file.

    A run that was interrupted goes on with the texts that are there: those that agree with their checksum. A
    text that does not is forgotten, and the next one takes its room.

    Args:
        path: the file; it is made when the first text is written.
        n_layer, n_embd: the shape of what is read of a text.

    Raises:
        WorkDirectoryError: the file cannot be read.
    """

    def __init__(self, path: Path, n_layer: int, n_embd: int) -> None:
        self._path = path
        self._shape = (n_layer, n_embd)
        self._record_bytes = _HEAD_BYTES + n_layer * n_embd * np.dtype(np.float16).itemsize
        self._numbers: dict[bytes, int] = {}
        """The number of the record of each text."""
        self._free: list[int] = []
        """The numbers of records that hold nothing."""
        self._n_records = 0
        try:
            if path.exists():
                self._load()
        except OSError as error:
            raise WorkDirectoryError.of("read", path, error) from error

    def __contains__(self, text: str) -> bool:
        return _digest(_encoded(text)) in self._numbers

    def write(self, text: str, values: ArrayLike) -> None:
        """Store what was read of a text, [n_layer, n_embd].

        Raises:
            ModelFileError: a value is NaN or too large for float16.
            WorkDirectoryError: the file cannot be written.
        """
        array = np.asarray(values)
        if array.shape != self._shape:
            raise ValueError(f"what is read of a text must be {list(self._shape)}, not {list(array.shape)}")
        too_large = ~(np.abs(array) <= _FLOAT16_MAX)  # true for NaN as well
        if too_large.any():
            layer = int(np.flatnonzero(too_large.any(axis=-1))[0])
            raise ModelFileError(
                f"the model gives NaN or very large values in layer {layer}; try another quantization"
            )
        name, content = _digest(_encoded(text)), array.astype(np.float16).tobytes()
        number = self._free.pop() if self._free else self._n_records
        try:
            self._write(number, name + _digest(name + content) + content)
        except OSError as error:
            raise WorkDirectoryError.of("write", self._path, error) from error
        self._n_records = max(self._n_records, number + 1)
        self._numbers[name] = number

    def of(self, texts: Iterable[str]) -> StoredLayers:
        """What was read of some texts, in their order. Raises `KeyError` where one is not there."""
        starts = [self._record_bytes * self._numbers[_digest(_encoded(text))] for text in texts]
        return StoredLayers(self._path, [start + _HEAD_BYTES for start in starts], *self._shape)

    def _load(self) -> None:
        with self._path.open("rb") as file:
            while len(record := file.read(self._record_bytes)) == self._record_bytes:
                name, checksum = record[:_DIGEST_BYTES], record[_DIGEST_BYTES:_HEAD_BYTES]
                if checksum == _digest(name + record[_HEAD_BYTES:]):
                    self._numbers[name] = self._n_records
                else:
                    self._free.append(self._n_records)
                self._n_records += 1
        if self._free:
            warnings.warn(
                f"{self._path} has {len(self._free)} damaged texts, which are read again; check the disk",
                stacklevel=3,
            )

    def _write(self, number: int, record: bytes) -> None:
        """Write a record; the part of one that an interruption leaves at the end is overwritten next time."""
        with self._path.open("r+b" if self._path.exists() else "xb", buffering=0) as file:
            file.seek(self._record_bytes * number)
            write_all(file, record)


class StoredLayers(Sequence[NDArray[np.float16]]):
    """[n_layer, n_texts, n_embd], of which a layer is read from the file when it is asked for."""

    def __init__(self, path: Path, starts: Sequence[int], n_layer: int, n_embd: int) -> None:
        self._path = path
        self._starts = starts
        self._layers = range(n_layer)
        self._n_embd = n_embd

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, layer: int) -> NDArray[np.float16]: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[NDArray[np.float16]]: ...
    def __getitem__(self, layer: int | slice) -> NDArray[np.float16] | Sequence[NDArray[np.float16]]:
        if isinstance(layer, slice):
            return [self[one] for one in self._layers[layer]]
        rows = np.empty((len(self._starts), self._n_embd), np.float16)
        offset = self._layers[layer] * rows.itemsize * self._n_embd
        if not self._starts:
            return rows  # perhaps there is no file
        try:
            with self._path.open("rb", buffering=0) as file:
                for row, start in zip(rows, self._starts, strict=True):
                    file.seek(start + offset)
                    if file.readinto(row.data) != row.nbytes:
                        raise OSError("it is shorter than it was")
        except OSError as error:
            raise WorkDirectoryError.of("read", self._path, error) from error
        return rows


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_DIGEST_BYTES]
