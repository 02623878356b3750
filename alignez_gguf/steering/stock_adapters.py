"""The edits as adapters that any llama.cpp takes: a LoRA that removes and a control vector that adds.

Both hold for every token of a decode, so a decode is cut where the strength changes. llama.cpp drops a LoRA
of scale 0 and a control vector without data from its graph, so strength 0 is the unsteered model bit for bit.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, edits_sha256
from alignez_gguf.errors import ModelFileError, OutputError, SteeringError
from alignez_gguf.exporters import stock
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.installer.source import cache_directory
from alignez_gguf.runtime.bindings import captured_log

_CACHED = 16
"""The most adapters that are cached; the oldest are deleted."""


class StockAdapters:
    """A LoRA and a control vector on a context.

    Args:
        context: the `llama_context *`.
        model: its `llama_model *`.
        lora: the file of the LoRA; `None` where nothing is removed.
        additions: [n_embd] by layer, from 1 on.

    Raises:
        SteeringError: llama.cpp cannot load the LoRA.
    """

    def __init__(
        self,
        context: Any,
        model: Any,
        *,
        lora: Path | None,
        additions: Mapping[int, NDArray[np.float32]],
    ) -> None:
        import llama_cpp.llama_cpp as llama

        self._llama = llama
        self._context = context
        # The buffer of llama_set_adapter_cvec starts at layer 1. A shorter one would leave the upper layers
        # as they were (llama_adapter_cvec::apply in src/llama-adapter.cpp).
        shape = llama.llama_model_n_layer(model) - 1, llama.llama_model_n_embd(model)
        self._additions = np.zeros(shape, np.float32)
        for layer, add in additions.items():
            self._additions[layer - 1] = add
        self._adds = bool(additions)
        self._lora: Any = None if lora is None else self._loaded(model, lora)
        self._strength = 0.0
        self._positions = range(0)
        self._now = 0.0

    def steer(self, strength: float, positions: range) -> None:
        self._strength, self._positions = strength, positions
        # For tokens that somebody else computes before the next batch: an image, at the start of a prompt.
        self._set(strength if 0 in positions else 0.0)

    def split_batch(self, first: int, n_tokens: int) -> Iterator[int]:
        position, end = first, first + n_tokens
        while position < end:
            start, stop = (min(max(edge, position), end) for edge in self._steered())
            inside = start <= position < stop
            until = stop if inside else start if position < start else end
            self._set(self._strength if inside else 0.0)
            yield until - position
            position = until

    def detach(self) -> None:
        self._set(0.0)
        if self._lora is not None:
            self._llama.llama_adapter_lora_free(self._lora)
            self._lora = None

    def _steered(self) -> tuple[int, int]:
        if self._strength == 0:
            return 0, 0
        return self._positions.start, self._positions.stop

    def _set(self, strength: float) -> None:
        if strength == self._now:
            return
        if self._lora is not None:
            count = 1 if strength else 0
            adapters = (self._llama.llama_adapter_lora_p_ctypes * count)(*[self._lora] * count)
            scales = (ctypes.c_float * count)(*[strength] * count)
            if self._llama.llama_set_adapters_lora(self._context, adapters, count, scales):
                raise SteeringError("llama.cpp cannot set the LoRA of the edit; load the model again")
        if self._adds:
            self._set_control_vector(strength)
        self._now = strength

    def _set_control_vector(self, strength: float) -> None:
        data, size = None, 0
        if strength:
            scaled = strength * self._additions
            data, size = scaled.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), scaled.size
        n_added, n_embd = self._additions.shape
        if self._llama.llama_set_adapter_cvec(self._context, data, size, n_embd, 1, 1 + n_added):
            raise SteeringError("llama.cpp cannot set the control vector of the edit; load the model again")

    def _loaded(self, model: Any, path: Path) -> Any:
        with captured_log() as log:
            adapter = self._llama.llama_adapter_lora_init(model, os.fsencode(path))
        if not adapter:
            raise SteeringError(f"llama.cpp cannot load the LoRA of the edit: {log.reason()}")
        return adapter


def attach(context: Any, model: Any, model_path: str, edits: Edits) -> StockAdapters:
    """Make the adapters of `edits` from the model's own file, or take them from the cache, and set them.

    Raises:
        SteeringError: stock llama.cpp cannot carry an edit, or the model's file is gone.
        ModelFileError: a weight cannot be dequantised.
        OutputError: the cache cannot be written.
    """
    try:
        weights = ModelWeights(model_path)
    except ModelFileError as error:
        raise SteeringError(
            f"the adapters of stock llama.cpp are made from the model's file: {error}"
        ) from error
    return StockAdapters(
        context,
        model,
        additions=stock.additions(edits, weights),
        lora=cached_lora(weights, edits),
    )


def cached_lora(weights: ModelWeights, edits: Edits) -> Path | None:
    """Return the cached LoRA of these edits for this file, or write it; `None` where nothing is removed.

    Raises:
        SteeringError, ModelFileError, OutputError: as `stock.write_lora`.
    """
    if all(edit.remove is None for edit in edits.values()):
        return None
    folder = cache_directory() / "adapters"
    identity = f"{weights.info.fingerprint[:32]}-{edits_sha256(edits)[:32]}-{stock.LORA_FORMAT_VERSION}"
    path = folder / f"{identity}.lora.gguf"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {folder}: {error.strerror or error}; set ALIGNEZ_CACHE_DIR to a folder that "
                "can be written"
            ) from error
        stock.write_lora(edits, weights, path)
        _forget_oldest(folder)
    return path


def _forget_oldest(folder: Path) -> None:
    by_age = sorted(folder.glob("*.lora.gguf"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[_CACHED:]:
        path.unlink(missing_ok=True)
