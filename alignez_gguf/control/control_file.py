"""The control file: a GGUF v3 file that holds the edits of a model. Its format is known here only.

Stock llama.cpp (common/common.cpp, common_control_vector_load_one) adds `direction.N` for N >= 1 and refuses
a file with any other tensor. So it steers rightly with a file that only adds, from layer 1 on, and refuses
one that removes, that adds at layer 0 or that has a gate, instead of applying a part of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit, is_orthonormal
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.gguf_header import MAX_ARRAY, GgufError, Header, Scalar, TensorInfo, read_header
from alignez_gguf.control.layer_report import FIGURES, REQUIRED_FIGURES, LayerReport
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.control.scope import Scope
from alignez_gguf.errors import ControlFileError, SteeringError
from alignez_gguf.storage.atomic import replacing

__all__ = ["FORMAT_VERSION", "ControlFile", "Field", "LayerReport", "ModelInfo"]

FORMAT_VERSION = 1
"""Files of a greater `alignez.format_version` are refused."""

Field = Scalar | tuple[Scalar, ...]
"""A value of the recipe or of the score: a scalar, or up to `MAX_ARRAY` scalars of one type."""

_ARCHITECTURE = "controlvector"
_F32 = 0
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_HASH = "alignez.sha256"
_GATE = "gate"
"""The tensor of a gate's weights; what else there is to it are `alignez.gate.tokens` and `.threshold`."""
_MAX_LAYERS = MAX_ARRAY
"""Greatest number of layers of a model: their figures have to be readable again."""
_MAX_RANK = 1024
"""Greatest rank of a removal: time and memory of its check grow with the square of the rank."""
_TENSOR = re.compile(r"(direction|projection|bias)\.(0|[1-9][0-9]{0,5})(\.gain)?")
_KINDS = {"direction": "add", "projection": "remove", "projection.gain": "gain", "bias": "bias"}
"""The tensors of a layer, with the fields of its edit that they hold."""
_KEY = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_MODEL_TEXT = ("arch", "name", "fingerprint", "quantization")
_MODEL_COUNT = ("n_embd", "n_layer")


@dataclass(frozen=True, eq=False)
class ControlFile:
    """A control file: edits, the model they were made for, and how they came about.

    Attributes:
        model: the model that the edits belong to.
        edits: by layer, counted from 0. Edits that do nothing are left out.
        recipe: how the directions were made; keys in lower case.
        layers: the figures of the fit, for all layers of the model.
        score: what the selection saw; keys in lower case.
        gate: which requests are steered; all of them if `None`.

    Raises:
        ControlFileError: no layer is edited, an edit does not fit `model`, or a value cannot be stored.
    """

    model: ModelInfo
    edits: Edits
    recipe: Mapping[str, Field] = field(default_factory=dict)
    layers: LayerReport | None = None
    score: Mapping[str, Field] = field(default_factory=dict)
    gate: Gate | None = None

    def __post_init__(self) -> None:
        edits = {layer: self.edits[layer] for layer in sorted(self.edits)}
        edits = {layer: edit for layer, edit in edits.items() if edit.decision != "none"}
        if not edits:
            raise ControlFileError("no layer is edited, so there is nothing to control")
        for layer, edit in edits.items():
            if layer < 0 or (self.model.n_layer and layer >= self.model.n_layer):
                raise ControlFileError(f"layer {layer} is edited, but the model is {self.model}")
            if edit.n_embd != self.model.n_embd:
                raise ControlFileError(
                    f"the edit of layer {layer} has width {edit.n_embd}, but the model is {self.model}"
                )
            if edit.rank > _MAX_RANK:
                raise ControlFileError(f"the removal of layer {layer} has rank {edit.rank}, over {_MAX_RANK}")
            if edit.scale > _FLOAT32_MAX:
                raise ControlFileError(f"the addition at layer {layer} is too long for a number of 32 bits")
        if self.layers is not None:
            self.layers.check(self.model.n_layer)
        if self.gate is not None and len(self.gate.tokens) > MAX_ARRAY:
            raise ControlFileError(f"the gate reads {len(self.gate.tokens)} tokens, over {MAX_ARRAY}")
        object.__setattr__(self, "edits", MappingProxyType(edits))
        for name in ("recipe", "score"):
            fields = {
                key: _storable(f"{name}.{key}", value) for key, value in sorted(getattr(self, name).items())
            }
            object.__setattr__(self, name, MappingProxyType(fields))

    @property
    def scope(self) -> Scope:
        """The time steps that the edits were chosen for; `generation` where the file does not say."""
        return Scope.parse(str(self.recipe.get("scope", Scope())))

    @property
    def framing(self) -> str:
        """The framing in which the edits were chosen, "chat" or "transcript"; empty if unknown."""
        return str(self.recipe.get("framing", ""))

    @property
    def sha256(self) -> str:
        """A hash of all that the control is: model, edits, gate, recipe, figures and score, in hex digits.

        It does not depend on how a file lays them out. Anybody can compute it: it finds damage and careless
        changes, not forgery.
        """
        content = {
            "model": [getattr(self.model, name) for name in (*_MODEL_TEXT, *_MODEL_COUNT)],
            "recipe": dict(self.recipe),
            "score": dict(self.score),
            **({} if self.gate is None else {"gate": self.gate.digest}),
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for name, array in (*self._tensors(), *self._figures()):
            digest.update(f"{name} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield the tensors of the file by name."""
        for layer, edit in self.edits.items():
            if edit.add is not None:
                yield f"direction.{layer}", edit.add
            if edit.remove is not None:
                yield f"projection.{layer}", edit.remove[0] if edit.rank == 1 else edit.remove
            if edit.gain is not None:
                yield f"projection.{layer}.gain", edit.gain
            if edit.bias is not None:
                yield f"bias.{layer}", edit.bias
        if self.gate is not None:
            yield _GATE, self.gate.weights

    def _figures(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        return iter(()) if self.layers is None else self.layers.columns()

    def check_fits(self, model: ModelInfo) -> None:
        """Refuse to be used with another model than the one the edits were made for.

        A file of another tool states no number of layers and names its architecture by hint only (repeng
        writes the name that transformers uses), so that a differing hint is a warning.

        Raises:
            ControlFileError: architecture, number of layers or width differ, or it edits a layer that the
                model does not have.
        """
        own = self.model
        hinted = own.n_layer == 0
        fits = own.n_embd == model.n_embd
        if not hinted:
            fits = fits and (own.arch, own.n_layer) == (model.arch, model.n_layer)
        if not fits:
            raise ControlFileError(
                f"the control file is for {own}, but the model is {model}; use one made for this model"
            )
        beyond = [layer for layer in self.edits if layer >= model.n_layer]
        if beyond:
            further = f" and {len(beyond) - 1} above it" if len(beyond) > 1 else ""
            raise ControlFileError(
                f"the control file edits layer {beyond[0]}{further}, but the model is {model}, numbered from "
                f"0 to {model.n_layer - 1}; use one made for this model"
            )
        if hinted and own.arch and own.arch != model.arch:
            warnings.warn(f"the control file hints at {own.arch!r}, but the model is {model}", stacklevel=2)
        if own.fingerprint and model.fingerprint and own.fingerprint != model.fingerprint:
            warnings.warn(
                f"the control file was made from another file of this shape ({own.name or 'unnamed'}, "
                f"{own.quantization or 'quantization unknown'}); check that it is the same model",
                stacklevel=2,
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file atomically. Equal content gives equal bytes.

        Raises:
            ControlFileError: the file cannot be written, or the model is known by hint only.
        """
        path = Path(path)
        if not self.model.n_layer:
            raise ControlFileError(
                f"cannot write {path}: its model is not known; "
                "set `model` to ModelInfo.from_gguf(...) of the model that it steers"
            )
        try:
            with replacing(path) as temporary:
                self._write(temporary)
        except OSError as error:
            raise ControlFileError(
                f"cannot write {path}: {error.strerror or error}; choose another place for the output"
            ) from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ControlFile:
        """Read a control file of ours, or one of repeng or llama.cpp (`direction.N` only).

        Nothing in the file is trusted: sizes, types, shapes, layers and values are checked.

        Raises:
            ControlFileError: the file is missing or malformed; the message names the field.
        """
        path = Path(path)
        try:
            header = read_header(path)
            return _Reader(path, header).control_file()
        except OSError as error:
            raise ControlFileError(f"cannot read {path}: {error.strerror or error}") from error
        except (GgufError, SteeringError, ControlFileError) as error:
            raise ControlFileError(f"{path} is not a usable control file: {error}") from error

    def _write(self, path: Path) -> None:
        import gguf

        kinds = gguf.GGUFValueType
        writer = gguf.GGUFWriter(path, _ARCHITECTURE)

        def put(key: str, value: Field) -> None:
            first = value[0] if isinstance(value, tuple) else value
            kind = {bool: kinds.BOOL, int: kinds.INT64, float: kinds.FLOAT64, str: kinds.STRING}[type(first)]
            if isinstance(value, tuple):
                writer.add_key_value(key, value, kinds.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)

        def put_floats(key: str, values: NDArray[np.float32]) -> None:
            writer.add_key_value(key, values.tolist(), kinds.ARRAY, sub_type=kinds.FLOAT32)

        writer.add_string(f"{_ARCHITECTURE}.model_hint", self.model.arch)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(self.edits))
        writer.add_uint32("alignez.format_version", FORMAT_VERSION)
        for name in _MODEL_TEXT:
            put(f"alignez.model.{name}", getattr(self.model, name))
        for name in _MODEL_COUNT:
            writer.add_uint32(f"alignez.model.{name}", getattr(self.model, name))
        for key, value in self.recipe.items():
            put(f"alignez.recipe.{key}", value)
        edit_of = [self.edits.get(layer, LayerEdit()) for layer in range(self.model.n_layer)]
        put("alignez.layer.decision", tuple(edit.decision for edit in edit_of))
        put_floats("alignez.layer.scale", np.array([edit.scale for edit in edit_of], dtype=np.float32))
        for name, values in self._figures():
            put_floats(f"alignez.layer.{name}", values)
        for key, value in self.score.items():
            put(f"alignez.score.{key}", value)
        if self.gate is not None:
            put("alignez.gate.tokens", tuple(self.gate.tokens.tolist()))
            put("alignez.gate.threshold", self.gate.threshold)
        writer.add_string(_HASH, self.sha256)
        for name, tensor in self._tensors():
            writer.add_tensor(name, tensor)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


class _Reader:
    """Checks the header of a control file field by field. Raises `ControlFileError` without the path."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self.metadata = header.metadata

    def control_file(self) -> ControlFile:
        arch = self.metadata.get("general.architecture")
        if arch != _ARCHITECTURE:
            raise ControlFileError(f"general.architecture is {arch!r}, not {_ARCHITECTURE!r}; is it a model?")
        if any(key.startswith("glp.") for key in self.metadata):
            raise ControlFileError(
                "it is a GLP file, whose directions may be meant for removal, not for addition"
            )
        ours = self._format_version() > 0
        tensors, weights = self._tensors()
        if not ours and weights is not None:
            raise ControlFileError("it has a gate but no alignez.format_version")
        if weights is None and any(key.startswith("alignez.gate.") for key in self.metadata):
            raise ControlFileError("it has alignez.gate keys but no tensor of that name")
        if not ours and any(kind != "direction" for kind, _ in tensors):
            raise ControlFileError("it has projections or biases but no alignez.format_version")
        control = ControlFile(
            model=self._model() if ours else self._hinted_model(tensors),
            edits=self._edits(tensors),
            recipe=self._fields("alignez.recipe.") if ours else {},
            layers=self._report() if ours else None,
            score=self._fields("alignez.score.") if ours else {},
            gate=None if weights is None else self._gate(weights),
        )
        if self.metadata.get(_HASH, control.sha256) != control.sha256:
            raise ControlFileError(
                "its content does not agree with its alignez.sha256, so it is damaged or was changed; "
                "get it again, or make it anew"
            )
        return control

    def _format_version(self) -> int:
        """Return the version of our format; 0 where another tool wrote the file."""
        key = "alignez.format_version"
        if key not in self.metadata:
            if any(name.startswith("alignez.") for name in self.metadata):
                raise ControlFileError(f"{key} is missing")
            return 0
        version = self._count(key)
        if version > FORMAT_VERSION:
            raise ControlFileError(
                f"{key} is {version}, and this alignez-gguf reads up to {FORMAT_VERSION}; update it"
            )
        return version

    def _model(self) -> ModelInfo:
        text = {name: self.metadata.get(f"alignez.model.{name}") for name in _MODEL_TEXT}
        for name, value in text.items():
            if not isinstance(value, str) or (name == "arch" and not value.isprintable()):
                raise ControlFileError(f"alignez.model.{name} is missing or not a string")
        counts = {name: self._count(f"alignez.model.{name}") for name in _MODEL_COUNT}
        if counts["n_layer"] > _MAX_LAYERS:
            raise ControlFileError(f"alignez.model.n_layer is {counts['n_layer']}, more than any model has")
        return ModelInfo(**{**text, **counts})  # type: ignore[arg-type]

    def _hinted_model(self, tensors: Mapping[tuple[str, int], TensorInfo]) -> ModelInfo:
        hint = self.metadata.get(f"{_ARCHITECTURE}.model_hint", "")
        widths = [tensor.shape[0] for tensor in tensors.values()]
        arch = hint if isinstance(hint, str) and hint.isprintable() else ""
        return ModelInfo(arch, n_embd=widths[0] if widths else 0, n_layer=0)

    def _count(self, key: str) -> int:
        value = self.metadata.get(key)
        if type(value) is not int or value < 1:
            raise ControlFileError(f"{key} is {value!r}, not a positive whole number")
        return value

    def _tensors(self) -> tuple[dict[tuple[str, int], TensorInfo], TensorInfo | None]:
        """Return the tensors of the edits by kind and layer, and the weights of the gate, if there is one."""
        tensors, weights = {}, None
        for tensor in self.header.tensors:
            match = _TENSOR.fullmatch(tensor.name)
            kind = "" if match is None else match[1] + (match[3] or "")
            if kind not in _KINDS and tensor.name != _GATE:
                raise ControlFileError(f"it has an unknown tensor {tensor.name!r}")
            dims = 2 if kind == "projection" else 1
            if tensor.ggml_type != _F32:
                raise ControlFileError(f"{tensor.name} is not F32")
            if len(tensor.shape) > dims or tensor.n_elements == 0:
                raise ControlFileError(f"{tensor.name} has the shape {list(tensor.shape)}")
            if tensor.offset + 4 * tensor.n_elements > self.header.file_size:
                raise ControlFileError(f"it ends inside {tensor.name}")
            if match is None:
                weights = tensor
            else:
                tensors[kind, int(match[2])] = tensor
        return tensors, weights

    def _gate(self, weights: TensorInfo) -> Gate:
        tokens = self.metadata.get("alignez.gate.tokens")
        if not isinstance(tokens, tuple) or not all(
            type(token) is int and 0 <= token < 2**31 for token in tokens
        ):
            raise ControlFileError("alignez.gate.tokens is not an array of token ids")
        threshold = self.metadata.get("alignez.gate.threshold")
        if type(threshold) is not float:
            raise ControlFileError(f"alignez.gate.threshold is {threshold!r}, not a number")
        return Gate(np.array(tokens, np.int32), self._array(weights), threshold)

    def _edits(self, tensors: Mapping[tuple[str, int], TensorInfo]) -> dict[int, LayerEdit]:
        edits = {}
        for layer in sorted({layer for _, layer in tensors}):
            arrays = {}
            for kind, argument in _KINDS.items():
                tensor = tensors.get((kind, layer))
                if tensor is not None:
                    arrays[argument] = self._array(tensor)
            remove = arrays.get("remove")
            if remove is not None and not is_orthonormal(np.atleast_2d(remove)):
                raise ControlFileError(f"projection.{layer} is not orthonormal")
            try:
                edits[layer] = LayerEdit(**arrays)
            except SteeringError as error:
                raise ControlFileError(f"layer {layer}: {error}") from error
        return edits

    def _array(self, tensor: TensorInfo) -> NDArray[np.float32]:
        values = np.fromfile(self.path, dtype="<f4", count=tensor.n_elements, offset=tensor.offset)
        if values.size != tensor.n_elements or not np.isfinite(values).all():
            raise ControlFileError(f"{tensor.name} has values that are NaN or infinite")
        return values.astype(np.float32).reshape(tensor.shape[::-1])

    def _report(self) -> LayerReport | None:
        columns: dict[str, NDArray[np.float32]] = {}
        for name in FIGURES:
            values = self.metadata.get(f"alignez.layer.{name}")
            if values is None:
                continue
            if not isinstance(values, tuple) or not all(type(value) is float for value in values):
                raise ControlFileError(f"alignez.layer.{name} is not an array of numbers")
            columns[name] = np.array(values, dtype=np.float32)
        missing = [name for name in REQUIRED_FIGURES if name not in columns]
        if columns and missing:
            raise ControlFileError(f"alignez.layer.{missing[0]} is missing")
        return LayerReport(**columns) if columns else None

    def _fields(self, prefix: str) -> dict[str, Field]:
        fields: dict[str, Field] = {}
        for key, value in self.metadata.items():
            if key.startswith(prefix):
                if value is None:
                    raise ControlFileError(f"{key} is too long")
                fields[key.removeprefix(prefix)] = value
        return fields


def _storable(key: str, value: Any) -> Field:
    """Convert `value` to the types that the file can hold.

    Raises:
        ControlFileError: it cannot hold the value.
    """
    if not _KEY.fullmatch(key):
        raise ControlFileError(f"{key!r} is not a name of lower-case letters, digits, '_' and '.'")
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = tuple(_scalar(key, item) for item in value)
        if not 1 <= len(items) <= MAX_ARRAY or len({type(item) for item in items}) != 1:
            raise ControlFileError(f"{key} must hold 1 to {MAX_ARRAY} values of one type")
        return items
    return _scalar(key, value)


def _scalar(key: str, value: Any) -> Scalar:
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) not in (bool, int, float, str):
        raise ControlFileError(f"{key} is a {type(value).__name__}, which a control file cannot hold")
    if type(value) is float and not np.isfinite(value):
        raise ControlFileError(f"{key} is {value}; only finite numbers can be stored")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ControlFileError(f"{key} is {value}, which does not fit 64 bits")
    scalar: Scalar = value
    return scalar
