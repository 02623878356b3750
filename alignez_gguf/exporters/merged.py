"""A model with the edits in its own weights: no adapter, and the speed of the original.

The removal goes into the weight (and bias) of `ffn_down`, the addition into its bias. Everything else, the
tokenizer and all metadata included, is copied as it is. A tensor at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit, check_strength, edits_sha256
from alignez_gguf.errors import ModelFileError, OutputError, SteeringError
from alignez_gguf.exporters.mlp_bias import residual_scale
from alignez_gguf.exporters.requantise import Requantiser
from alignez_gguf.exporters.weights import DownProjection, ModelWeights
from alignez_gguf.progress import Reporter, SilentReporter
from alignez_gguf.storage.atomic import replacing

DEFAULT_TOLERANCE = 0.02
"""Root mean square error of rounding, relative to the weight, beyond which a wider type is taken."""


@dataclass(frozen=True)
class MergedWeight:
    """The type and the rounding of one merged weight.

    Attributes:
        name: of the tensor.
        layer: counted from 0.
        type_before, type: what it was and is stored as.
        came_back: share of the removed component that is still there, 0 to 1.
        error: what rounding changed, relative to the weight (root mean square).
    """

    name: str
    layer: int
    type_before: str
    type: str
    came_back: float
    error: float


def write(
    control: ControlFile,
    weights: ModelWeights,
    output: Path,
    *,
    strength: float = 1.0,
    tolerance: float = DEFAULT_TOLERANCE,
    progress: Reporter | None = None,
) -> list[MergedWeight]:
    """Write the merged model, in one file, atomically; return a report on every weight that changed.

    A weight keeps its type where rounding changes it by no more than `tolerance`, else it becomes Q8_0, F16
    or F32, the first that does. Nor may rounding bring back more than a tenth of what was removed.

    Raises:
        SteeringError: an addition that the architecture cannot carry, or a layer without `ffn_down`.
        ModelFileError: the model cannot be read, or a weight not be dequantised.
        OutputError: the file cannot be written.
    """
    if output.exists() and any(part.samefile(output) for part in weights.parts):
        raise OutputError(f"{output} is the model itself; choose another place for the output")
    merge = _Merge(control, weights, check_strength(strength), tolerance)
    try:
        with replacing(output) as temporary:
            return merge.write(temporary, progress or SilentReporter())
    except OSError as error:
        raise OutputError(
            f"cannot write {output}: {error.strerror or error}; choose another place for the output"
        ) from error


class _Merge:
    """One merge: which tensors change, and into what."""

    def __init__(
        self, control: ControlFile, weights: ModelWeights, strength: float, tolerance: float
    ) -> None:
        self._control = control
        self._weights = weights
        self._strength = strength
        self._tolerance = tolerance
        self._biases: dict[str, NDArray[np.float32]] = {}
        self._changed: dict[str, tuple[DownProjection, Requantiser]] = {}
        for layer, edit in control.edits.items():
            self._biases |= self._biases_of(layer, edit)
            if edit.remove is None:
                continue
            for down in weights.down_projections(layer):
                down.scales()  # refuses one for each row, which would not commute with the removal
                self._changed[down.weight.name] = down, Requantiser(down, edit, strength)

    def write(self, path: Path, progress: Reporter) -> list[MergedWeight]:
        import gguf

        writer = gguf.GGUFWriter(path, self._weights.info.arch)
        try:
            readers = [_reader(part) for part in self._weights.parts]
            self._add_metadata(writer, readers[0])
            types = self._add_tensor_infos(writer, readers, progress)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            return self._write_tensors(writer, readers, types, progress)
        finally:
            writer.close()

    def _biases_of(self, layer: int, edit: LayerEdit) -> dict[str, NDArray[np.float32]]:
        """The new biases of a layer: b + s V^T G V b, and s times what is added."""
        downs = self._weights.down_projections(layer)
        biases = {}
        for down in downs:
            old = down.biases()
            if old is None or edit.remove is None:
                continue
            v = edit.remove.astype(np.float64)
            new = old + self._strength * ((old @ v.T) * edit.gains) @ v
            biases[_bias_name(down)] = new.astype(np.float32).reshape(_bias_shape(down))
        if edit.add is not None or edit.bias is not None:
            down, scale = self._carrier(layer, downs)
            name = _bias_name(down)
            old = biases.get(name, down.biases())
            added = self._strength * (
                np.float32(0) if edit.bias is None else edit.bias
            ) + self._strength / scale * (np.float32(0) if edit.add is None else edit.add)
            biases[name] = (added if old is None else old.ravel() + added).astype(np.float32)
        return biases

    def _carrier(self, layer: int, downs: list[DownProjection]) -> tuple[DownProjection, float]:
        """The dense projection whose bias can be the addition, and the scale that the block applies to it."""
        info = self._weights.info
        scale = residual_scale(info.arch, self._weights.metadata)
        if len(downs) != 1 or downs[0].kind != "dense" or downs[0].scale is not None:
            reason = "is a mixture of experts or has a scale of its own"
        elif scale is None:
            reason = f"belongs to an architecture, {info.arch}, that loads no bias there or may change it"
        else:
            return downs[0], scale
        raise SteeringError(
            f"the control adds at layer {layer}, and the ffn_down there {reason}, so the addition cannot be "
            "merged into it; use --format stock, or export a control that only removes"
        )

    def _add_metadata(self, writer: Any, reader: Any) -> None:
        import gguf

        for field in reader.fields.values():
            if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith(("GGUF.", "split.")):
                continue
            if field.name == gguf.Keys.General.ALIGNMENT:
                writer.data_alignment = int(field.contents())
            kind, value = field.types[0], field.contents()
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            if value is not None:
                writer.add_key_value(field.name, value, kind, sub_type=sub_type)
        writer.add_string("alignez.merged.edits", edits_sha256(self._control.edits))
        writer.add_float32("alignez.merged.strength", self._strength)
        writer.add_string("alignez.merged.model_fingerprint", self._weights.info.fingerprint)

    def _add_tensor_infos(self, writer: Any, readers: list[Any], progress: Reporter) -> dict[str, Any]:
        """Choose the types of the changed weights, and announce all tensors."""
        types: dict[str, Any] = {}
        new = dict(self._biases)
        with progress.stage("choosing types", len(self._changed)) as advance:
            for tensor in _tensors(readers):
                if tensor.name in self._changed:
                    kind = types[tensor.name] = self._type(*self._changed[tensor.name])
                    shape = (*tensor.data.shape[:-1], _row_bytes(tensor, kind))
                    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
                    advance(1)
                    continue
                data = new.pop(tensor.name, tensor.data)
                kind = None if data is not tensor.data else tensor.tensor_type
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
        for name, bias in new.items():
            writer.add_tensor_info(name, bias.shape, bias.dtype, bias.nbytes)
        return types

    def _write_tensors(
        self, writer: Any, readers: list[Any], types: dict[str, Any], progress: Reporter
    ) -> list[MergedWeight]:
        report = []
        new = dict(self._biases)
        total = sum(len(reader.tensors) for reader in readers)
        with progress.stage("writing tensors", total) as advance:
            for tensor in _tensors(readers):
                if tensor.name in self._changed:
                    down, requantiser = self._changed[tensor.name]
                    rows, share = requantiser.rows(types[tensor.name])
                    writer.write_tensor_data(rows)
                    report.append(
                        MergedWeight(
                            tensor.name,
                            down.layer,
                            tensor.tensor_type.name,
                            types[tensor.name].name,
                            share.came_back,
                            share.error,
                        )
                    )
                else:
                    writer.write_tensor_data(new.pop(tensor.name, tensor.data))
                advance(1)
            for bias in new.values():
                writer.write_tensor_data(bias)
        return report

    def _type(self, down: DownProjection, requantiser: Requantiser) -> Any:
        """The type of a changed weight: the first that is exact enough."""
        from gguf import GGMLQuantizationType as Type

        for kind in dict.fromkeys((down.weight.type, Type.Q8_0, Type.F16)):
            if requantiser.fits(kind, self._tolerance):
                return kind
        return Type.F32


def _reader(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except ValueError as error:
        raise ModelFileError(
            f"{path} is not a usable GGUF model: {error}; download or convert the model again"
        ) from error


def _tensors(readers: list[Any]) -> Iterator[Any]:
    for reader in readers:
        yield from reader.tensors


def _row_bytes(tensor: Any, kind: Any) -> int:
    """Bytes of a row of a tensor once it is stored as `kind`."""
    import gguf

    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(tensor.shape[0]) // int(block) * int(n_bytes)


def _bias_name(down: DownProjection) -> str:
    return f"{down.weight.name.removesuffix('weight')}bias"


def _bias_shape(down: DownProjection) -> tuple[int, ...]:
    return (-1,) if down.kind == "dense" else (down.n_expert, -1)
