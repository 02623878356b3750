"""A context: the KV cache of a model and the graph that computes on it, for many sequences at once."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignez_gguf.closing import Closing
from alignez_gguf.control.edits import Edits
from alignez_gguf.errors import AlignezError, ModelFileError
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.bindings import captured_log
from alignez_gguf.runtime.model import Model, physical_cores

CELLS = 256
"""llama.cpp rounds the cells of a sequence up to a multiple of this (src/llama-context.cpp)."""

_STATE_HEADER = struct.Struct("=Ii")
"""The header of a sequence's state: a magic number and the number of the sequence."""
_COUNT = struct.Struct("=I")
"""The count of streams of cells, behind the header, and of the cells of each stream, before them."""
_REASONS = {1: "the KV cache is full", 2: "it was aborted", -1: "the batch is invalid"}


class Context(Closing):
    """Decodes batches of tokens of one model.

    Args:
        model: the model, which has to outlive the context.
        n_ctx: the longest sequence, in tokens.
        n_sequences: the number of sequences in the cache, which are numbered from 0.
        n_batch: the most tokens in one `decode`. They are computed in one piece.
        n_threads: default: the number of physical cores.
        unified: one pool of cells for all sequences instead of `n_ctx` cells for each. A copy of a sequence
            is then free; but where a token lies in the pool, and so in which order attention adds up,
            depends on the other sequences.
        f32_cache: keep keys and values in F32 instead of F16.
        on_node: a callback of type `ggml_backend_sched_eval_callback`, kept alive here.
        edits: see `bindings.set_edits`. Without any, no patch is needed.

    Raises:
        ModelFileError: llama.cpp cannot make such a context.
        SteeringError: llama.cpp refuses the edits.
        RuntimeUnavailableError: there are edits, and the patch is missing.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_sequences: int = 1,
        n_batch: int = 512,
        n_threads: int | None = None,
        unified: bool = False,
        f32_cache: bool = False,
        on_node: Any = None,
        edits: Edits | None = None,
    ) -> None:
        self._pointer: Any = None
        self.model = model
        self.n_ctx = n_ctx
        self.n_sequences = n_sequences
        self._on_node = on_node
        cells = -(-n_ctx // CELLS) * CELLS
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = cells if unified else cells * n_sequences
        parameters.n_seq_max = n_sequences
        parameters.n_batch = parameters.n_ubatch = n_batch
        parameters.n_threads = parameters.n_threads_batch = n_threads or physical_cores()
        parameters.kv_unified = unified
        if f32_cache:
            parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
            # Flash attention would round them to F16 (build_attn_mha in src/llama-graph.cpp).
            parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if on_node is not None:
            parameters.cb_eval = on_node
        with captured_log() as log:
            self._pointer = llama.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise ModelFileError(
                f"llama.cpp cannot make a context of {n_sequences} sequences of {cells} tokens: "
                f"{log.reason()}; ask for fewer or shorter ones"
            )
        try:
            self._prepare(edits or {})
        except BaseException:
            self.close()  # the model must not be freed before it
            raise

    def _prepare(self, edits: Edits) -> None:
        if edits:
            bindings.set_edits(self.pointer, edits)
        self._memory: Any = llama.llama_get_memory(self._pointer)
        self._empty_state = self._state(0)  # nothing is computed yet
        self.n_batch = int(llama.llama_n_batch(self._pointer))  # no more than there are cells
        self._batch = _Batch(self.n_batch)

    @property
    def pointer(self) -> Any:
        """The `llama_context *`. Raises `ValueError` once the context is closed."""
        if not self._pointer:
            raise ValueError("the context is closed")
        return self._pointer

    def decode(
        self, tokens: ArrayLike, positions: ArrayLike, sequences: ArrayLike, outputs: ArrayLike
    ) -> None:
        """Compute a batch and add it to the cache; the four arguments have one entry for each token.

        Args:
            tokens: token ids.
            positions: of each token in its sequence; the first one that the cache does not hold, and so on.
            sequences: the sequence of each token. Sequences with neighbouring numbers are computed together.
            outputs: whether `logits` is wanted for the token.

        Raises:
            AlignezError: llama.cpp could not compute it.
        """
        batch = self._batch.filled(tokens, positions, sequences, outputs)
        status = llama.llama_decode(self.pointer, batch)
        if status != 0:
            raise AlignezError(
                f"llama.cpp could not compute {batch.n_tokens} tokens: "
                f"{_REASONS.get(status, f'status {status}')}; report it with the model's name"
            )

    def logits(self, index: int) -> NDArray[np.float32]:
        """Return the logits after token `index` of the last batch, [n_vocab]: a view until `decode`."""
        row = llama.llama_get_logits_ith(self.pointer, index)
        if not row:
            raise ValueError(f"token {index} of the last batch has no logits")
        return np.ctypeslib.as_array(row, (self.model.n_vocab,))

    def copy_sequence(self, source: int, target: int) -> None:
        """Make the cache of `target` a copy of that of `source`."""
        llama.llama_memory_seq_rm(self._open_memory, target, -1, -1)
        llama.llama_memory_seq_cp(self._open_memory, source, target, -1, -1)

    def truncate_sequence(self, sequence: int, length: int) -> bool:
        """Forget all but the first `length` positions.

        Returns False, having forgotten nothing, where the model cannot forget a part (recurrent ones).
        """
        return bool(llama.llama_memory_seq_rm(self._open_memory, sequence, length, -1))

    def save_sequence(self, sequence: int) -> bytes | None:
        """Return the state of a sequence in the cache, for `load_sequence` of a context of the same model.

        None where that is not all in the cells of one cache, as the state of an empty sequence tells: of
        recurrent layers there is more, and of a second cache, for layers that attend only to the last tokens,
        llama.cpp saves no more than the very last token sees (`llama_kv_cache::state_write` in
        src/llama-kv-cache.cpp).
        """
        empty_streams = _COUNT.pack(self.n_sequences) + bytes(_COUNT.size * self.n_sequences)
        if self._empty_state[_STATE_HEADER.size :] != empty_streams:
            return None
        state = self._state(sequence)
        begin = _STATE_HEADER.size + _COUNT.size * (1 + sequence)
        return state[begin : len(state) - _COUNT.size * (self.n_sequences - 1 - sequence)]

    def load_sequence(self, sequence: int, saved: bytes) -> bool:
        """Make a sequence what was saved; where that fails, it is empty.

        llama.cpp itself refuses what was saved by a context of more or fewer streams, though all but one of
        them are empty there (`llama_kv_cache::state_read_sinfo` in src/llama-kv-cache.cpp).
        """
        begin = _STATE_HEADER.size + _COUNT.size
        state = self._empty_state[:begin] + saved + self._empty_state[begin + _COUNT.size :]
        with captured_log():
            read = llama.llama_state_seq_set_data(
                self.pointer, (ctypes.c_uint8 * len(state)).from_buffer_copy(state), len(state), sequence
            )
        if read == len(state):
            return True
        self.truncate_sequence(sequence, 0)
        return False

    def _state(self, sequence: int) -> bytes:
        size = llama.llama_state_seq_get_size(self.pointer, sequence)
        state = (ctypes.c_uint8 * size)()
        return ctypes.string_at(state, llama.llama_state_seq_get_data(self.pointer, state, size, sequence))

    def clear(self) -> None:
        """Forget all sequences."""
        llama.llama_memory_clear(self._open_memory, True)

    @property
    def _open_memory(self) -> Any:
        return self.pointer and self._memory

    def close(self) -> None:
        if self._pointer:
            llama.llama_free(self._pointer)
            self._pointer = None


class _Batch:
    """A `llama_batch` over arrays that are allocated once."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        # seq_id is an array of pointers, each to the sequences of one token: here always one.
        stride = self._sequences.itemsize
        self._pointers = self._sequences.ctypes.data + stride * np.arange(size, dtype=np.uintp)
        self._struct = llama.llama_batch(
            n_tokens=0,
            token=_cast(self._tokens, ctypes.POINTER(llama.llama_token)),
            embd=None,
            pos=_cast(self._positions, ctypes.POINTER(llama.llama_pos)),
            n_seq_id=_cast(self._counts, ctypes.POINTER(ctypes.c_int32)),
            seq_id=_cast(self._pointers, ctypes.POINTER(ctypes.POINTER(llama.llama_seq_id))),
            logits=_cast(self._outputs, ctypes.POINTER(ctypes.c_int8)),
        )

    def filled(
        self, tokens: ArrayLike, positions: ArrayLike, sequences: ArrayLike, outputs: ArrayLike
    ) -> Any:
        values = np.asarray(tokens)
        n_tokens = len(values)
        if not 0 < n_tokens <= len(self._tokens):
            raise ValueError(f"a batch of {n_tokens} tokens; the context takes 1 to {len(self._tokens)}")
        self._tokens[:n_tokens] = values
        self._positions[:n_tokens] = positions
        self._sequences[:n_tokens] = sequences
        self._outputs[:n_tokens] = outputs
        self._struct.n_tokens = n_tokens
        return self._struct


def _cast(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(kind)
