"""Identifies a model, well enough to tell whether a control file belongs to it.

Reads the header of a GGUF file, never its weights (a few samples for the fingerprint aside).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Protocol

from alignez_gguf.control.gguf_header import GgufError, Header, read_header
from alignez_gguf.control.model_kind import require_text_model
from alignez_gguf.errors import ModelFileError

FLOAT_WEIGHTS = frozenset({"F32", "F16", "BF16"})
"""The `quantization` of models that are not quantized."""

FIRST_PART = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")
"""The name of the first file of a split model: its own name, and how many files there are."""

_POST_NORM_UNKNOWN_TO_GGUF = {"muse-glimmer"}
"""Architectures of llama.cpp (src/models) with a norm behind the MLP that the gguf package does not list."""

_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
"""The name of any file of a split model; see `llama_split_path` in llama.cpp."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_MAX_DIGITS = 20
"""Python refuses to read numbers of some thousands of digits."""


class LoadedModel(Protocol):
    """The part of `llama_cpp.Llama` that identifies its model."""

    model_path: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class ModelInfo:
    """A model as a control file names it.

    Attributes:
        arch: `general.architecture` of its GGUF file, such as "llama".
        n_embd: width of the residual stream.
        n_layer: number of blocks, without draft (multi-token prediction) layers. 0 where a control file of
            another tool does not say; `arch` is then no more than that file's hint.
        name: `general.name`.
        fingerprint: identifies the file, see `from_gguf`.
        quantization: the type of most weights, such as "Q4_K_M".
    """

    arch: str
    n_embd: int
    n_layer: int
    name: str = ""
    fingerprint: str = ""
    quantization: str = ""

    def __str__(self) -> str:
        layers = f"{self.n_layer} layers" if self.n_layer else "an unknown number of layers"
        return f"{self.arch or 'a model of unknown architecture'} with {layers} of width {self.n_embd}"

    @property
    def has_post_norm(self) -> bool:
        """Whether a norm stands between the MLP and the residual stream, as in gemma 2 and 3, olmo2 and glm4.

        A gap between MLP outputs is then none between residual streams: the norm scales each channel, by .1
        to 525 in gemma-3-270m, so that adding it at the end of the block moves next to nothing.
        """
        import gguf

        names = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        tensors = gguf.MODEL_TENSORS.get(names.get(self.arch), ())
        return gguf.MODEL_TENSOR.FFN_POST_NORM in tensors or self.arch in _POST_NORM_UNKNOWN_TO_GGUF

    @classmethod
    def from_gguf(cls, path: str | PathLike[str]) -> ModelInfo:
        """Describe the model in a GGUF file; of a split model, give the first part.

        The fingerprint is the SHA-256 of the header (metadata and tensor descriptions), the file size, and
        64 samples of 4 KiB spread evenly over the tensor data: it tells quantizations and fine-tunes apart
        in milliseconds, whatever the size of the file. It is no defence against forgery.

        Raises:
            ModelFileError: missing, truncated, not a GGUF file, or not a model that writes text.
        """
        path = Path(path)
        return cls.from_header(path, read_model_header(path))

    @classmethod
    def from_header(cls, path: Path, header: Header) -> ModelInfo:
        """Describe the model in a GGUF file whose header has been read.

        Raises:
            ModelFileError: as `from_gguf`.
        """
        info = cls._from_metadata(header.metadata, str(path))
        try:
            fingerprint = _fingerprint(path, header)
        except OSError as error:
            raise _unreadable(path, error) from error
        return replace(info, fingerprint=fingerprint)

    @classmethod
    def from_llama(cls, llm: LoadedModel) -> ModelInfo:
        """Describe the model of a `llama_cpp.Llama`: from its file, or from its metadata if that is gone.

        Raises:
            ModelFileError: as `from_gguf`.
        """
        if Path(llm.model_path).is_file():
            return cls.from_gguf(llm.model_path)
        return cls._from_metadata(llm.metadata, "the loaded model")

    @classmethod
    def _from_metadata(cls, metadata: Mapping[str, object], source: str) -> ModelInfo:
        _refuse_later_part(metadata, source)
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or not arch or not arch.isprintable():
            raise ModelFileError(f"{source} does not name its architecture; convert the model again")
        if arch == "controlvector":
            raise ModelFileError(f"{source} is a control file, not a model; give the model that it steers")
        require_text_model(arch, metadata, source)
        n_layer = _integer(metadata, f"{arch}.block_count", source) - _integer(
            metadata, f"{arch}.nextn_predict_layers", source, default=0
        )
        n_embd = _integer(metadata, f"{arch}.embedding_length", source)
        if n_layer < 1 or n_embd < 1:
            raise ModelFileError(
                f"{source} states {n_layer} layers of width {n_embd}; convert the model again"
            )
        file_type = _integer(metadata, "general.file_type", source, default=-1)
        name = metadata.get("general.name", "")
        return cls(
            arch,
            n_embd,
            n_layer,
            name if isinstance(name, str) else "",
            quantization=_quantization(file_type),
        )


def read_model_header(path: Path) -> Header:
    """Read the header of a file of a model.

    Raises:
        ModelFileError: missing, truncated or not a GGUF file.
    """
    try:
        header = read_header(path)
        _refuse_truncated(header)
    except OSError as error:
        raise _unreadable(path, error) from error
    except GgufError as error:
        raise ModelFileError(
            f"{path} is not a usable GGUF model: {error}; download or convert the model again"
        ) from error
    return header


def model_parts(path: Path, header: Header) -> dict[Path, Header]:
    """Return all files of a model with their headers, the first file first.

    Args:
        path: the model, of a split one its first part.
        header: of that file.

    Raises:
        ModelFileError: a part is missing, truncated, or not the part that its name says.
    """
    parts = {path: header}
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or count < 2:
        return parts
    match = FIRST_PART.fullmatch(path.name)
    if match is None or int(match[2]) != count:
        raise ModelFileError(
            f"{path} is one of {count} parts, but is not named NAME-00001-of-{count:05}.gguf; "
            "give the parts their names back"
        )
    for index in range(1, count):
        part = path.with_name(f"{match[1]}-{index + 1:05}-of-{count:05}.gguf")
        if not part.exists():
            raise ModelFileError(
                f"{path} is the first of {count} parts, and part {index + 1} is missing; put {part.name} "
                "beside it"
            )
        parts[part] = read_model_header(part)
        if parts[part].metadata.get("split.no") != index:
            raise ModelFileError(
                f"{part} is not part {index + 1} of a split model, as its name says; download it again"
            )
    return parts


def _refuse_later_part(metadata: Mapping[str, object], source: str) -> None:
    """Refuse all parts of a split model but the first; they name nothing, not even the architecture."""
    index = _integer(metadata, "split.no", source, default=0)
    if index == 0:
        return
    count = _integer(metadata, "split.count", source, default=0)
    match = _PART.fullmatch(Path(source).name)
    first = (
        f"{match[1]}-00001-of-{match[2]}.gguf" if match else f"the one named NAME-00001-of-{count:05}.gguf"
    )
    raise ModelFileError(
        f"{source} is part {index + 1} of {count} of a split model; give its first part, {first}"
    )


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"cannot read the model {path}: {error.strerror or error}; check the path")


def _integer(metadata: Mapping[str, object], key: str, source: str, default: int | None = None) -> int:
    """Read an integer of the metadata, which llama.cpp returns as text."""
    value = metadata.get(key, default)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < _MAX_DIGITS:
        value = int(value)
    if type(value) is not int:
        raise ModelFileError(f"{source} is not a language model: its header has no usable {key}")
    return value


def _quantization(file_type: int) -> str:
    import gguf

    try:
        return str(gguf.LlamaFileType(file_type).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return ""


def _refuse_truncated(header: Header) -> None:
    import gguf

    for tensor in header.tensors:
        try:
            block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.ggml_type)]
        except ValueError:  # a type newer than the gguf package: its size is not known
            continue
        if tensor.offset + tensor.n_elements // block * n_bytes > header.file_size:
            raise GgufError(f"it ends inside tensor {tensor.name!r}, so it is incomplete")


def _fingerprint(path: Path, header: Header) -> str:
    digest = hashlib.sha256()
    first = min(header.data_offset, header.file_size)  # a file without tensors may be aligned to anywhere
    last = max(first, header.file_size - _SAMPLE_BYTES)
    with path.open("rb") as file:
        digest.update(file.read(first))
        digest.update(header.file_size.to_bytes(8, "little"))
        for sample in range(_SAMPLES):
            file.seek(first + (last - first) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
