"""Logits of llama.cpp with the stock forms loaded from their files, as llama-server does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.exporters import stock
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.steering.stock_adapters import StockAdapters
from tests.runtime.context import Context, rows


def written(gguf: Path, edits: Mapping[int, LayerEdit], folder: Path) -> list[Path]:
    """The stock form of edits of this model."""
    return stock.write(ControlFile(ModelInfo.from_gguf(gguf), edits), ModelWeights(gguf), folder / "out.gguf")


def adapters(context: Context, files: Sequence[Path]) -> StockAdapters:
    """The files, loaded into a context."""
    lora = next((path for path in files if path.name.endswith(".lora.gguf")), None)
    cvec = next((path for path in files if path.name.endswith(".cvec.gguf")), None)
    added = {} if cvec is None else ControlFile.load(cvec).edits
    return StockAdapters(
        context.pointer,
        context._model,
        lora=lora,
        additions={layer: edit.add for layer, edit in added.items() if edit.add is not None},
    )


def logits(
    context: Context, loaded: StockAdapters, tokens: Sequence[int], strength: float
) -> NDArray[np.float32]:
    """[n_tokens, n_vocab], all tokens steered."""
    loaded.steer(strength, range(len(tokens)))
    assert list(loaded.split_batch(0, len(tokens))) == [len(tokens)]
    return context.logits(rows(tokens))
