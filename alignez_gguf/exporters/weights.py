"""The weights that make the MLP output of a layer, read out of a GGUF file as float32, a piece at a time.

The files are mapped, so a model of any size costs no more memory than the piece that is being computed with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.gguf_header import TensorInfo, Value
from alignez_gguf.control.model_info import ModelInfo, model_parts, read_model_header
from alignez_gguf.errors import ModelFileError, SteeringError
from alignez_gguf.exporters.stacked import minima

WeightKind = Literal["dense", "experts"]

_DOWN = re.compile(r"blk\.(\d+)\.(ffn_down(?:_exps|_shexp|_chexps)?)\.weight")
_PIECE = 1 << 22
"""Weights that are dequantised at once."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as a GGUF file keeps it; nothing is read before it is asked for."""

    path: Path
    info: TensorInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy's order: the contiguous dimension is the last."""
        return self.info.shape[::-1]

    @cached_property
    def type(self) -> Any:
        """Its `gguf.GGMLQuantizationType`."""
        import gguf

        try:
            return gguf.GGMLQuantizationType(self.info.ggml_type)
        except ValueError as error:
            raise ModelFileError(
                f"{self.path} keeps {self.name} in the unknown type {self.info.ggml_type}; "
                "update the gguf package"
            ) from error

    @cached_property
    def rows(self) -> NDArray[np.uint8]:
        """[product of all dimensions but the last, bytes of a row], mapped and read-only."""
        import gguf

        block, n_bytes = gguf.GGML_QUANT_SIZES[self.type]
        shape = (self.info.n_elements // self.shape[-1], self.shape[-1] // block * n_bytes)
        return np.memmap(self.path, np.uint8, "r", self.info.offset, shape)

    def dequantised(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Some of `rows` as numbers, float32 [n_rows, contiguous dimension]. Raises as `numbers`."""
        return self.numbers(self.rows[start:stop])

    def numbers(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Whole blocks of this tensor's type as numbers, a new array [n_rows, n].

        Raises:
            ModelFileError: the gguf package cannot dequantise the type.
        """
        import gguf

        try:
            values = gguf.dequantize(np.array(rows), self.type)
        except (NotImplementedError, KeyError, ValueError) as error:
            raise ModelFileError(
                f"{self.name} is stored as {self.type.name}, which cannot be dequantised; use another "
                "quantization of the model"
            ) from error
        return np.asarray(values, dtype=np.float32).reshape(len(rows), -1)


@dataclass(frozen=True, eq=False)
class DownProjection:
    """The last product of an MLP: x = scale * (W h) + bias, of one MLP or of every expert.

    Attributes:
        layer: counted from 0.
        weight: [n_embd, n_ff], or [n_expert, n_embd, n_ff].
        scale: one number, or one for each expert; `None` for 1.
        bias: [n_embd], or [n_expert, n_embd].
    """

    layer: int
    weight: StoredTensor
    scale: StoredTensor | None
    bias: StoredTensor | None

    @property
    def kind(self) -> WeightKind:
        return "dense" if len(self.weight.shape) == 2 else "experts"

    @property
    def n_expert(self) -> int:
        """1 for a dense MLP."""
        return 1 if self.kind == "dense" else self.weight.shape[0]

    def scales(self) -> NDArray[np.float32]:
        """[n_expert]."""
        if self.scale is None:
            return np.ones(self.n_expert, np.float32)
        values = self.scale.dequantised().ravel()
        if values.size != self.n_expert:
            raise ModelFileError(f"{self.scale.name} has {values.size} numbers, not {self.n_expert}")
        return values

    def biases(self) -> NDArray[np.float32] | None:
        """[n_expert, n_embd]."""
        return None if self.bias is None else self.bias.dequantised().reshape(self.n_expert, -1)

    def pieces(self, expert: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The weight of an expert by ranges of its n_embd rows: the range, and float32 [rows, n_ff]."""
        n_embd, n_ff = self.weight.shape[-2:]
        step = max(1, _PIECE // n_ff)
        for start in range(0, n_embd, step):
            stop = min(n_embd, start + step)
            first = expert * n_embd
            yield slice(start, stop), self.weight.dequantised(first + start, first + stop)

    def columns(self, expert: int, start: int, stop: int) -> NDArray[np.float32]:
        """Some of the n_ff columns of an expert's weight, float32 [n_embd, columns].

        `start` must be a multiple of the block size of the type.
        """
        import gguf

        block, n_bytes = gguf.GGML_QUANT_SIZES[self.weight.type]
        n_embd, n_ff = self.weight.shape[-2:]
        rows = self.weight.rows[expert * n_embd : (expert + 1) * n_embd]
        stop = min(stop, n_ff)
        return self.weight.numbers(rows[:, start // block * n_bytes : stop // block * n_bytes])

    def projected(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """V W of each expert, float64 [n_expert, k, n_ff], for V [k, n_embd]."""
        k, n_ff = len(vectors), self.weight.shape[-1]
        total = np.zeros((self.n_expert, k, n_ff))
        for expert in range(self.n_expert):
            for rows, weight in self.pieces(expert):
                total[expert] += vectors[:, rows].astype(np.float64) @ weight
        return total

    def projected_minima(self, vectors: NDArray[np.float32]) -> NDArray[np.float64] | None:
        """V m of each expert, float64 [n_expert, k, n_blocks]; `None` where blocks have no minimum m."""
        m = minima(self.weight.rows, self.weight.type)
        if m is None:
            return None
        return vectors.astype(np.float64) @ m.reshape(self.n_expert, -1, m.shape[-1])


class ModelWeights:
    """The tensors of a GGUF model; of a split one, of all its parts.

    Raises:
        ModelFileError: a file is missing or not a usable GGUF, or the model writes no text.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        header = read_model_header(self.path)
        self.info = ModelInfo.from_header(self.path, header)
        self.metadata: Mapping[str, Value] = header.metadata
        parts = model_parts(self.path, header)
        self.parts = list(parts)
        self.tensors = {
            tensor.name: StoredTensor(part, tensor)
            for part, header in parts.items()
            for tensor in header.tensors
        }

    def down_projections(self, layer: int) -> list[DownProjection]:
        """The products whose sum is the MLP output of a layer.

        Raises:
            SteeringError: there are none, or they are not n_embd wide.
        """
        found = []
        for name, tensor in self.tensors.items():
            match = _DOWN.fullmatch(name)
            if match is None or int(match[1]) != layer:
                continue
            if len(tensor.shape) not in (2, 3) or tensor.shape[-2] != self.info.n_embd:
                raise SteeringError(
                    f"{name} has the shape {list(tensor.shape)}, which is no down projection to a width of "
                    f"{self.info.n_embd}; use the patched runtime: alignez-gguf runtime build"
                )
            stem = name.removesuffix("weight")
            found.append(
                DownProjection(
                    layer, tensor, self.tensors.get(f"{stem}scale"), self.tensors.get(f"{stem}bias")
                )
            )
        if not found:
            raise SteeringError(
                f"layer {layer} of {self.path.name} ({self.info.arch}) has no ffn_down weight, so its MLP "
                "output cannot be edited through one; leave the layer out"
            )
        return found
