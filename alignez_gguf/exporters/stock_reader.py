"""Reads the stock forms back: which edits they are, and whether they were made from this very model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit, is_orthonormal
from alignez_gguf.control.gguf_header import GgufError, Header, read_header
from alignez_gguf.errors import ControlFileError
from alignez_gguf.exporters.stacked import carrier
from alignez_gguf.exporters.stock import LoraPair, additions, lora
from alignez_gguf.exporters.weights import ModelWeights, StoredTensor

_B = re.compile(r"(blk\.(\d+)\.ffn_down[a-z_]*\.weight)\.lora_b")
_SAME = 1e-3
"""Relative difference up to which the A of a file counts as that of the model."""


def is_lora(path: Path) -> bool:
    """Whether a file is a LoRA in GGUF. Raises `ControlFileError` where it cannot be read."""
    return _header(path).metadata.get("general.type") == "adapter"


def read(paths: Sequence[Path], weights: ModelWeights) -> ControlFile:
    """The control that a LoRA, a control vector, or both of them are.

    Raises:
        ControlFileError: a file is not one that `stock.write` writes, or was made from another model.
    """
    removals: dict[int, NDArray[np.float32]] = {}
    added: dict[int, NDArray[np.float32]] = {}
    for path in paths:
        if is_lora(path):
            removals |= _removals(path, weights)
        else:
            vector = ControlFile.load(path)
            vector.check_fits(weights.info)
            added |= {layer: edit.add for layer, edit in vector.edits.items() if edit.add is not None}
    bare = {layer: LayerEdit(remove=vectors) for layer, vectors in removals.items()}
    constants = additions(bare, weights)
    edits = {
        layer: LayerEdit(add=_difference(added.get(layer), constants.get(layer)), remove=removals.get(layer))
        for layer in {*removals, *added}
    }
    return ControlFile(weights.info, edits)


def _removals(path: Path, weights: ModelWeights) -> dict[int, NDArray[np.float32]]:
    """The removed rows V of each layer, from B; A has to be V W of this model."""
    header = _header(path)
    arch = header.metadata.get("general.architecture")
    if arch != weights.info.arch:
        raise ControlFileError(f"{path} is for the architecture {arch}, but the model is {weights.info}")
    tensors = {tensor.name: StoredTensor(path, tensor) for tensor in header.tensors}
    removals: dict[int, NDArray[np.float32]] = {}
    for name, tensor in tensors.items():
        match = _B.fullmatch(name)
        if match is None:
            continue
        vectors = _vectors(_numbers(tensor)[0])
        if not len(vectors) or not is_orthonormal(vectors):
            raise ControlFileError(f"{path} is not a LoRA that removes directions: {name} is not orthonormal")
        removals[int(match[2])] = vectors
    expected = lora({layer: LayerEdit(remove=v) for layer, v in removals.items()}, weights)
    if {f"{name}.lora_{part}" for name in expected for part in "ab"} != set(tensors):
        raise ControlFileError(f"{path} does not edit the ffn_down of its layers, all of them, and no more")
    for name, pair in expected.items():
        a, b = (_numbers(tensors[f"{name}.lora_{part}"]) for part in "ab")
        if not _is_product(a, b, pair):
            raise ControlFileError(
                f"{path} was made from another file than {weights.path.name}: {name} does not fit; "
                "convert the control for this one"
            )
        stored = carrier(weights.tensors[name].type)
        if stored is not None and tensors[f"{name}.lora_a"].type != stored:
            raise ControlFileError(
                f"{path} keeps {name} in a type that rounds otherwise than the model's own weight; convert "
                "the control again"
            )
    return removals


def _numbers(tensor: StoredTensor) -> NDArray[np.float32]:
    """A tensor as [n_expert, rows, columns]; a dense one has one expert."""
    return tensor.dequantised().reshape(-1, *tensor.shape[-2:])


def _vectors(b: NDArray[np.float32]) -> NDArray[np.float32]:
    """V [k, n_embd] of B = -[c V^T, c' V^T, ..], with powers of two that fall (`stacked.Stack`)."""
    lengths = np.linalg.norm(b, axis=0)
    if not lengths[0] > 0:
        return np.empty((0, len(b)), np.float32)
    rank = np.count_nonzero(lengths > lengths[0] / 2)
    scale = np.float32(2.0 ** np.round(np.log2(lengths[0])))
    return np.ascontiguousarray(-b[:, :rank].T / scale)


def _is_product(a: NDArray[np.float32], b: NDArray[np.float32], pair: LoraPair) -> bool:
    """Whether B A, of every expert, is that of `pair`."""
    expected = pair.a.reshape(-1, *pair.a.shape[-2:])
    v = -pair.b.reshape(-1, *pair.b.shape[-2:])[0].T
    n_expert, _, n_ff = expected.shape
    if a.shape != (n_expert, b.shape[-1], n_ff) or b.shape[:-1] != (n_expert, v.shape[-1]):
        return False
    inside = v @ b  # B = V^T V B where it has no part beside the span of V
    beside = np.abs(b - v.T @ inside).max()
    return bool(beside <= _SAME * np.abs(b).max() and _near(-inside @ a, expected))


def _near(got: NDArray[Any], expected: NDArray[Any]) -> bool:
    return bool(np.abs(got - expected).max() <= _SAME * np.abs(expected).max())


def _difference(
    added: NDArray[np.float32] | None, constant: NDArray[np.float32] | None
) -> NDArray[np.float32] | None:
    """The addition proper: without the constant that a bias needs. Rounding leaves no addition behind."""
    if added is None and constant is None:
        return None
    total = np.zeros(1, np.float32) if added is None else added
    if constant is None:
        return total
    rest: NDArray[np.float32] = total - constant
    return None if np.abs(rest).max() <= _SAME * np.abs(constant).max() else rest


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except OSError as error:
        raise ControlFileError(f"cannot read {path}: {error.strerror or error}") from error
    except GgufError as error:
        raise ControlFileError(f"{path} is not a usable control file: {error}") from error
