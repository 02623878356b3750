"""The models that the tools and the documentation speak of, from `models.txt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_LIST = Path(__file__).parents[2] / "models.txt"


@dataclass(frozen=True)
class KnownModel:
    """A line of `models.txt`.

    Attributes:
        name: short, without spaces.
        base: hub id of the base model; None where the line stands for the aligned version.
        aligned: hub id of the version of it that its makers aligned.
        gguf_repository: hub id of the repository that holds the quantized file.
        gguf_file: its name there; of the aligned version where `base` is None, else of the base model.
        architecture: as GGUF names it.
        layers: number of blocks.
        width: n_embd.
    """

    name: str
    base: str | None
    aligned: str
    gguf_repository: str
    gguf_file: str
    architecture: str
    layers: int
    width: int


def known_models(path: Path | None = None) -> list[KnownModel]:
    """All of them, in the order of the file, which is the repository's own if no other is given."""
    if path is None:
        path = _LIST
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_model(line) for line in lines if line.strip() and not line.startswith("#")]


def _model(line: str) -> KnownModel:
    name, base, aligned, repository, file, architecture, layers, width = line.split("\t")
    return KnownModel(
        name=name,
        base=None if base == "-" else base,
        aligned=aligned,
        gguf_repository=repository,
        gguf_file=file,
        architecture=architecture,
        layers=int(layers),
        width=int(width),
    )
