"""What tests let a child process do, since llama.cpp may end it. Light imports only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.llama import sequences
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import ModelFileError, SteeringError
from alignez_gguf.readout import Readout
from alignez_gguf.runtime.context import Context as EngineContext
from alignez_gguf.verification.verify import verify
from tests.runtime.context import Context, rows


@dataclass(frozen=True)
class Tried:
    """What became of an edit: the logits before it, with it, and without it again."""

    refusal: str
    before: NDArray[np.float32]
    edited: NDArray[np.float32]
    """Of a refused one, after the refusal."""
    off: NDArray[np.float32]


def try_edits(gguf: Path, edits: dict[int, LayerEdit], tokens: Sequence[int]) -> Tried:
    """Set edits on a context and take the logits of a prompt."""
    refusal = ""
    with Context(gguf) as context:
        before = context.logits(rows(tokens))
        try:
            context.set_edits(edits)
        except SteeringError as error:
            refusal = str(error)
        edited = context.logits(rows(tokens))
        if not refusal:
            context.set_strength(0.0)
        return Tried(refusal, before, edited, context.logits(rows(tokens)))


def read_last_token(gguf: Path, text: str) -> tuple[list[str], dict[str, NDArray[np.float16]]]:
    """What an engine says that it can read, and what it reads at the last token of a text."""
    sequences.Context = lambda *args, **kw: EngineContext(*args, **kw, f32_cache=True)  # type: ignore[misc]
    read: dict[str, NDArray[np.float16]] = {}
    with LlamaEngine(gguf, n_ctx=256, n_threads=1) as engine:
        for hook in ("mlp", "residual"):
            with suppress(ModelFileError):
                ((read[hook],),) = engine.activations([Passage(text)], [Readout(hook)])  # type: ignore[arg-type]
        return sorted(engine.hooks), read


def verify_patched(gguf: Path, edits: dict[int, LayerEdit]) -> tuple[bool, list[str]]:
    """Whether a verification passes, and why a layer does not."""
    found = verify(gguf, ControlFile(ModelInfo.from_gguf(gguf), edits), runtime="patched", n_threads=1)
    return found.ok, [check.reason for check in found.layers]
