"""A bare llama.cpp context over its C API, as the tests of the patch need it: every row and every logit.

Light imports only, since a child process imports it too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.bindings import captured_log
from tests.runtime import gpu

_MAX_SEQUENCES = 4


@dataclass(frozen=True)
class Row:
    """One token of a batch."""

    token: int
    position: int
    sequences: tuple[int, ...] = (0,)
    output: bool = True
    """Whether its logits are wanted."""


def rows(tokens: Sequence[int], sequence: int = 0, start: int = 0) -> list[Row]:
    """Consecutive tokens of one sequence."""
    return [Row(token, position, (sequence,)) for position, token in enumerate(tokens, start)]


class DecodeError(Exception):
    """`llama_decode` returned a status other than 0."""


class Context:
    """A model and a context.

    Args:
        gguf: the model.
        cells: tokens in the cache, and the most in one `decode`.
        micro_batch: the most that are computed at once.
        cache_type: of keys and values; default: F32.
        flash_attention: which other types of values than F32 and F16 need.
        whole_window: keep all tokens for layers that attend to the last ones, too.
        n_threads: that compute; tiny models gain nothing from more than one.
    """

    def __init__(
        self,
        gguf: Path,
        *,
        cells: int = 256,
        micro_batch: int = 256,
        cache_type: int = llama_cpp.GGML_TYPE_F32,
        flash_attention: bool = False,
        whole_window: bool = True,
        n_threads: int = 1,
    ) -> None:
        self.n_nodes = 0
        """Nodes of the graphs that were computed, all in all."""
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._count_node)
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.n_gpu_layers = gpu.LAYERS
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = cells, cells, micro_batch
        parameters.swa_full = whole_window
        parameters.n_seq_max, parameters.kv_unified = _MAX_SEQUENCES, True
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.type_k = parameters.type_v = cache_type
        parameters.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        parameters.cb_eval = self._callback
        parameters.no_perf = False
        with captured_log():
            self._model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), model_parameters)
            self.pointer = llama_cpp.llama_init_from_model(self._model, parameters)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        llama_cpp.llama_free(self.pointer)
        llama_cpp.llama_model_free(self._model)

    def set_edits(self, edits: dict[int, LayerEdit]) -> None:
        bindings.set_edits(self.pointer, edits)

    def set_controls(self, controls: Sequence[dict[int, LayerEdit]]) -> None:
        bindings.set_controls(self.pointer, controls)

    def set_strength(
        self,
        strength: float,
        *,
        control: int = 0,
        sequence: int = -1,
        first: int = 0,
        end: int | None = None,
    ) -> None:
        bindings.set_strength(
            self.pointer, strength, control=control, sequence=sequence, first=first, end=end
        )

    def decode(self, batch_rows: Sequence[Row]) -> NDArray[np.float32]:
        """Decode after what is cached; return the logits [rows with output, n_vocab]."""
        batch = llama_cpp.llama_batch_init(len(batch_rows), 0, _MAX_SEQUENCES)
        batch.n_tokens = len(batch_rows)
        for i, row in enumerate(batch_rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.output
            batch.n_seq_id[i] = len(row.sequences)
            for j, sequence in enumerate(row.sequences):
                batch.seq_id[i][j] = sequence
        with captured_log() as log:
            status = llama_cpp.llama_decode(self.pointer, batch)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise DecodeError(f"{status}: {log.reason()}")
        return np.stack([self._logits(i) for i, row in enumerate(batch_rows) if row.output])

    def logits(self, batch_rows: Sequence[Row]) -> NDArray[np.float32]:
        """Decode from an empty cache; return the logits [rows with output, n_vocab]."""
        self.clear()
        return self.decode(batch_rows)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.pointer), True)

    def truncate(self, length: int) -> bool:
        """Ask llama.cpp to forget all but the first positions of sequence 0; what it answers."""
        memory = llama_cpp.llama_get_memory(self.pointer)
        return bool(llama_cpp.llama_memory_seq_rm(memory, 0, length, -1))

    def n_reused(self) -> int:
        """Decodes that computed the graph of the decode before them again."""
        return int(llama_cpp.llama_perf_context(self.pointer).n_reused)

    def _logits(self, row: int) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,)).copy()

    def _count_node(self, tensor: int, ask: bool, user_data: int) -> bool:
        # ggml_backend_sched_compute_splits asks for every node, and goes on where nobody wants its data
        self.n_nodes += ask
        return False


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Every line that llama.cpp logs, at any level."""
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(former, data)


def steered_difference(gguf: Path, edits: dict[int, LayerEdit], tokens: Sequence[int]) -> float:
    """Largest difference that edits make to the logits of a prompt; for a child process.

    A CPU that lacks an instruction kills the process at the first product with a quantized matrix.
    """
    with Context(gguf) as context:
        base = context.logits(rows(tokens))
        context.set_edits(edits)
        steered = context.logits(rows(tokens))
        context.set_strength(0.0)
        assert np.array_equal(context.logits(rows(tokens)), base)
    return float(np.abs(steered - base).max())
