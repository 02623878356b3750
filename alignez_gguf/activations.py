"""The embeddings of both classes: layers x pairs x n_embd in float16, in memory or on disk.

Pairs are written as they are read from the model and may arrive in any order; nothing is ever held in float32
for all layers. This module knows nothing of engines.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignez_gguf.atomic import replacing
from alignez_gguf.errors import ModelFileError, WorkDirectoryError

ReadingPosition = Literal["prompt", "response", "response-mean"]
"""Where a pair is embedded: at the last token of query and response, as the paper does, as the mean over the
tokens of the response, or at the last token of the prompt that asks for the response under a persona."""

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_DIGEST_BYTES = 16
_CHUNK = 1 << 20
"""Bytes that are written at a time."""


class ForeignArraysError(WorkDirectoryError):
    """A directory holds something else than the arrays that are asked for: damaged ones, or another job's."""


class Activations:
    """What is read of every layer for the helpful and the harmful side of every pair.

    With a directory the arrays live in memory-mapped .npy files there, and a run that was interrupted goes on
    with the rows that are `done`: those that agree with the checksum that was written after them.

    Attributes:
        helpful, harmful: float16 [n_layer, n_pairs, n_embd]; what rows that are not done hold means nothing.
        done: bool [n_pairs].
    """

    def __init__(
        self, n_layer: int, n_pairs: int, n_embd: int, directory: str | PathLike[str] | None = None
    ) -> None:
        """Allocate the arrays, or open those that an earlier run left in `directory`.

        Raises:
            ForeignArraysError: the directory holds something else.
            WorkDirectoryError: the directory cannot be used.
        """
        folder = None if directory is None else Path(directory)
        shape = (n_layer, n_pairs, n_embd)
        self.helpful = _array(folder, "helpful", shape, np.float16)
        self.harmful = _array(folder, "harmful", shape, np.float16)
        self._digests = _array(folder, "digests", (n_pairs, _DIGEST_BYTES), np.uint8)
        self.done = np.array([self._is_done(pair) for pair in range(n_pairs)], dtype=np.bool_)
        _release(self.helpful)
        _release(self.harmful)

    def write(self, pair: int, helpful: ArrayLike, harmful: ArrayLike) -> None:
        """Store both embeddings of a pair, [n_layer, n_embd] each.

        With a directory, the rows reach the file before their checksum does.

        Raises:
            ModelFileError: a value is NaN or too large for float16.
            WorkDirectoryError: the rows cannot be written.
        """
        for target, values in ((self.helpful, helpful), (self.harmful, harmful)):
            array = np.asarray(values)
            too_large = ~(np.abs(array) <= _FLOAT16_MAX)  # true for NaN as well
            if too_large.any():
                layer = int(np.flatnonzero(too_large.any(axis=-1))[0])
                raise ModelFileError(
                    f"the model gives NaN or very large values in layer {layer}; try another quantization"
                )
            target[:, pair] = array
        for store in (self.helpful, self.harmful):
            _flush(store)
        self._digests[pair] = self._digest(pair)
        for store in (self.helpful, self.harmful):
            _release(store)
        _flush(self._digests)
        self.done[pair] = True

    def _is_done(self, pair: int) -> bool:
        stored = self._digests[pair]
        return bool(stored.any()) and bool((stored == self._digest(pair)).all())

    def _digest(self, pair: int) -> NDArray[np.uint8]:
        digest = hashlib.sha256(self.helpful[:, pair].tobytes())
        digest.update(self.harmful[:, pair].tobytes())
        return np.frombuffer(digest.digest()[:_DIGEST_BYTES], np.uint8)


class SelectedPairs(Sequence[NDArray[np.float16]]):
    """Some pairs of [n_layer, n_pairs, n_embd], copied a layer at a time when that layer is asked for.

    The pages of a memory map are given back after each copy.
    """

    def __init__(self, layers: NDArray[np.float16], pairs: NDArray[np.int64]) -> None:
        self._layers = layers
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, layer: int) -> NDArray[np.float16]: ...
    @overload
    def __getitem__(self, layer: slice) -> SelectedPairs: ...
    def __getitem__(self, layer: int | slice) -> NDArray[np.float16] | SelectedPairs:
        if isinstance(layer, slice):
            return SelectedPairs(self._layers[layer], self._pairs)
        copied = np.asarray(self._layers[layer][self._pairs])
        _release(self._layers)
        return copied


def class_gap(helpful: Any, harmful: Any, weights: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
    """Mean helpful minus mean harmful: from [n_layer, n_pairs, n_embd] each to float32 [n_layer, n_embd].

    Summed in float64, layer by layer: float16 sums overflow. `weights` [n_pairs] count the pairs.
    """
    return np.stack(
        [
            (_mean(good, weights) - _mean(bad, weights)).astype(np.float32)
            for good, bad in zip(helpful, harmful, strict=True)
        ]
    )


def _mean(rows: Any, weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    if weights is None:
        return np.asarray(np.mean(rows, axis=0, dtype=np.float64))
    return np.asarray(np.average(np.asarray(rows, np.float64), axis=0, weights=weights))


def _array(folder: Path | None, name: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    if folder is None:
        return np.zeros(shape, dtype)
    path = folder / f"{name}.npy"
    kind = np.dtype(dtype)
    header = _header(shape, kind)
    n_bytes = int(np.prod(shape)) * kind.itemsize
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                _allocate(temporary, header, n_bytes)
        with path.open("rb") as file:
            whole = (
                file.read(len(header)) == header and os.fstat(file.fileno()).st_size == len(header) + n_bytes
            )
        if not whole:
            raise ForeignArraysError(
                f"{path} does not hold {kind} {list(shape)}: it is damaged or belongs to another job; "
                "remove it or choose another work directory"
            )
        return np.memmap(path, dtype=kind, mode="r+", offset=len(header), shape=shape)
    except (OSError, ValueError) as error:
        raise WorkDirectoryError(
            f"cannot use {path}: {getattr(error, 'strerror', None) or error}; make room for it, or choose "
            "another work directory"
        ) from error


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """How a .npy file of these values begins."""
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(header := io.BytesIO(), description)
    return header.getvalue()


def _allocate(path: Path, header: bytes, n_bytes: int) -> None:
    """Write zeros. In a file with holes, a disk that is full later would kill the process that fills them."""
    with path.open("wb") as file:
        file.write(header)
        for start in range(0, n_bytes, _CHUNK):
            file.write(bytes(min(_CHUNK, n_bytes - start)))


def _flush(array: NDArray[Any]) -> None:
    if not isinstance(array, np.memmap):
        return
    try:
        array.flush()
    except OSError as error:
        raise WorkDirectoryError(
            f"cannot write {array.filename}: {error.strerror or error}; choose another work directory"
        ) from error


def _release(array: NDArray[Any]) -> None:
    """Give the pages of a memory map back; they are read again when they are asked for."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
