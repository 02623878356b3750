"""Real control files to start from, taken apart.

Knows the layout of GGUF (docs/gguf.md of ggml-org/ggml) by itself, so that no reader under test decides
what is tried.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

N_EMBD, N_LAYER, ARCHITECTURE = 64, 3, "llama"
"""Of the model that the corpus is for."""

ALIGNMENT = 32
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value, by the number of its type."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file describes it; its data need not have the size that the shape asks for."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None
    """In the data section; `None` for the place where it is."""


@dataclass(frozen=True)
class Seed:
    """A real control file: its bytes, its parts, and where its fields stand."""

    data: bytes
    metadata: tuple[bytes, ...]
    """Each key with its type and value, as they stand in the file."""
    tensors: tuple[Tensor, ...]
    fields: tuple[tuple[int, int], ...]
    """First byte and width (4 or 8) of every count, length, type, extent and offset."""


def corpus() -> tuple[Seed, ...]:
    """Real control files for a model of `N_LAYER` x `N_EMBD`, of each kind; the same ones every time."""
    with tempfile.TemporaryDirectory() as folder:
        return tuple(parse(path.read_bytes()) for path in _write_corpus(Path(folder)))


def parse(data: bytes) -> Seed:
    """Take a well-formed GGUF v3 file apart. Not for hostile ones."""
    walk = _Walk(data)
    return walk.seed()


def encode(metadata: Sequence[bytes], tensors: Sequence[Tensor]) -> bytes:
    """Put a file together. Tensors follow each other as they must, unless one states another offset."""
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)), *metadata]
    blob = []
    size = 0
    for tensor in tensors:
        offset = size if tensor.offset is None else tensor.offset
        head.append(counted(tensor.name) + struct.pack("<I", len(tensor.shape)))
        head.append(struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.kind, offset))
        blob.append(tensor.data + bytes(-len(tensor.data) % ALIGNMENT))
        size += len(blob[-1])
    start = b"".join(head)
    return start + bytes(-len(start) % ALIGNMENT) + b"".join(blob)


class _Walk:
    """Reads a well-formed file from front to back and notes where its fields are."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 8
        self.fields: list[tuple[int, int]] = [(4, 4)]

    def seed(self) -> Seed:
        n_tensors, n_keys = self.number(8), self.number(8)
        metadata = []
        for _ in range(n_keys):
            start = self.at
            self.text()
            self.value(self.number(4))
            metadata.append(self.data[start : self.at])
        described = [self.tensor() for _ in range(n_tensors)]
        start = self.at + -self.at % ALIGNMENT
        tensors = []
        for tensor in described:
            first = start + (tensor.offset or 0)
            size = 4 * prod(tensor.shape)
            tensors.append(replace(tensor, data=self.data[first : first + size], offset=None))
        return Seed(self.data, tuple(metadata), tuple(tensors), tuple(self.fields))

    def number(self, width: int) -> int:
        self.fields.append((self.at, width))
        self.at += width
        return int.from_bytes(self.data[self.at - width : self.at], "little")

    def text(self) -> bytes:
        size = self.number(8)
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            kind, length = self.number(4), self.number(8)
            for _ in range(length):
                self.value(kind)
        elif SIZES[kind] in (4, 8):
            self.number(SIZES[kind])
        else:
            self.at += SIZES[kind]

    def tensor(self) -> Tensor:
        name = self.text()
        shape = tuple(self.number(8) for _ in range(self.number(4)))
        return Tensor(name, shape, self.number(4), b"", self.number(8))


def counted(text: bytes) -> bytes:
    """A string as GGUF writes it."""
    return struct.pack("<Q", len(text)) + text


def _write_corpus(folder: Path) -> list[Path]:
    """Additions, removals of rank 1 and 3, both, with and without figures; and what another tool writes."""
    import gguf

    from alignez_gguf.control.control_file import ControlFile, Field, LayerReport
    from alignez_gguf.control.edits import LayerEdit
    from alignez_gguf.control.model_info import ModelInfo

    rng = np.random.default_rng(0)
    model = ModelInfo(ARCHITECTURE, N_EMBD, N_LAYER, name="tiny", fingerprint="0" * 16, quantization="F32")
    basis = np.linalg.qr(rng.standard_normal((N_EMBD, 3)))[0].T.astype(np.float32)
    added = rng.standard_normal(N_EMBD).astype(np.float32)
    figures = LayerReport(*(np.full(N_LAYER, value, dtype=np.float32) for value in (0.75, 0.9, 0.1, 0.2)))
    recipe: dict[str, Field] = {"method": "svd", "seed": 1, "scope": "all", "layers": (0, 1, 2), "rate": 0.5}
    files = (
        ControlFile(model, {1: LayerEdit(add=added)}),
        ControlFile(model, {0: LayerEdit(remove=basis[0])}),
        ControlFile(
            model, {0: LayerEdit(remove=basis), 2: LayerEdit(add=added, remove=basis[1])}, recipe, figures
        ),
        ControlFile(
            model,
            {layer: LayerEdit(add=added, remove=basis[layer]) for layer in range(N_LAYER)},
            recipe,
            figures,
            {"score": 1.5, "kl": 0.02, "decided": True},
        ),
    )
    paths = [folder / f"{number}.gguf" for number in range(len(files) + 1)]
    for path, file in zip(paths, files, strict=False):
        file.save(path)
    writer = gguf.GGUFWriter(paths[-1], "controlvector")
    writer.add_string("controlvector.model_hint", ARCHITECTURE)
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", added)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return paths
