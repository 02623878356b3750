"""Reads the header of a GGUF file, its metadata and the places of its tensors, without trusting it.

The reader of the `gguf` package builds an array per token of the vocabulary, which takes seconds on a real
model, and it believes the counts that a file states. Here every length is checked against what is left of
the file before it is used. Layout: docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | None
"""A metadata value; `None` for an array longer than `MAX_ARRAY` (a vocabulary, say)."""

MAX_ARRAY = 4096
"""Length above which arrays are skipped."""
MAX_ARRAY_ITEMS = 1 << 18
"""Number of items of all arrays together that are read; further arrays are skipped, since an item takes up to
ten times as much memory as file."""
MAX_KEYS = 4096
MAX_TENSORS = 1 << 16
"""Greatest number of tensors, more than any model has; each costs more memory than file."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMBERS = {kind: struct.Struct(f"<{form}") for kind, form in _FORMATS.items()}
_U32, _U64 = _NUMBERS[4], _NUMBERS[10]
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class GgufError(ValueError):
    """An error in a GGUF file; callers add the name of the file and the remedy."""


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in a file. `shape` is in ggml order: `shape[0]` is the contiguous dimension."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    """Number of bytes from the start of the file."""

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The content of a header, and the sizes against which the rest is checked."""

    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    """Number of bytes from the start of the file to the first tensor."""
    file_size: int


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file at `path`.

    Raises:
        OSError: the file cannot be opened.
        GgufError: it is not a GGUF file, or a field of the header is wrong; the message names it.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise GgufError("it does not start with the letters GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()


class _Cursor:
    """Reads forward through a header; never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = len(_MAGIC)
        self.items_left = MAX_ARRAY_ITEMS

    def header(self) -> Header:
        version = self.number(_U32, "version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            kind = "big-endian" if swapped in _VERSIONS else f"of GGUF version {version}"
            raise GgufError(f"it is {kind}; only little-endian files of version 2 and 3 can be read")
        n_tensors = int(self.number(_U64, "tensor count"))
        n_keys = int(self.number(_U64, "metadata count"))
        if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
            raise GgufError(
                f"it states {n_tensors} tensors and {n_keys} metadata keys, more than any model has"
            )
        metadata: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self.string("a metadata key")
            if key in metadata:
                raise GgufError(f"the key {key!r} appears twice")
            metadata[key] = self.value(int(self.number(_U32, f"type of {key!r}")), key)
        tensors = [self.tensor() for _ in range(n_tensors)]
        return self._placed(metadata, tensors)

    def number(self, form: struct.Struct, what: str) -> int | float:
        start = self.at
        self.skip(form.size, what)
        number: int | float = form.unpack_from(self.data, start)[0]
        return number

    def skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.at:
            raise GgufError(f"it ends inside {what}")
        self.at += n_bytes

    def string(self, what: str) -> str:
        length = int(self.number(_U64, what))
        start = self.at
        self.skip(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"{what} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Value:
        what = f"the value of {key!r}"
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        raise GgufError(f"{what} has the unknown type {kind}")

    def array(self, what: str) -> tuple[Scalar, ...] | None:
        kind = int(self.number(_U32, what))
        length = int(self.number(_U64, what))
        if kind in _NUMBERS:
            form = _NUMBERS[kind]
            start = self.at
            self.skip(length * form.size, what)
            if not self.keeps(length):
                return None
            return struct.unpack_from(f"<{length}{_FORMATS[kind]}", self.data, start)
        if kind != _STRING:
            raise GgufError(f"{what} is an array of the unsupported type {kind}")
        if self.keeps(length):
            return tuple(self.string(what) for _ in range(length))
        self.skip_strings(length, what)
        return None

    def keeps(self, length: int) -> bool:
        """Whether an array is kept, rather than skipped."""
        if length > min(MAX_ARRAY, self.items_left):
            return False
        self.items_left -= length
        return True

    def skip_strings(self, count: int, what: str) -> None:
        """Step over a vocabulary; the loop that decides how long a model takes to open."""
        at, last, data, unpack = self.at, self.size - 8, self.data, _U64.unpack_from
        for _ in range(count):
            if at > last:
                raise GgufError(f"it ends inside {what}")
            at += 8 + unpack(data, at)[0]
        self.at = at
        self.skip(0, what)

    def tensor(self) -> TensorInfo:
        name = self.string("a tensor name")
        what = f"the description of tensor {name!r}"
        n_dims = int(self.number(_U32, what))
        if not 1 <= n_dims <= _MAX_DIMS:
            raise GgufError(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(int(self.number(_U64, what)) for _ in range(n_dims))
        return TensorInfo(name, shape, int(self.number(_U32, what)), int(self.number(_U64, what)))

    def _placed(self, metadata: dict[str, Value], tensors: list[TensorInfo]) -> Header:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise GgufError(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.at // alignment) * alignment
        names = {tensor.name for tensor in tensors}
        if len(names) != len(tensors):
            raise GgufError("two tensors have the same name")
        placed = tuple(TensorInfo(t.name, t.shape, t.ggml_type, start + t.offset) for t in tensors)
        for tensor in placed:
            if tensor.offset >= self.size:
                raise GgufError(f"it ends before tensor {tensor.name!r}")
        return Header(metadata, placed, start, self.size)
