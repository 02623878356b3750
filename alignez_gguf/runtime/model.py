"""A loaded GGUF model: weights, vocabulary and metadata, over llama-cpp-python's low-level API."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as llama

from alignez_gguf.closing import Closing
from alignez_gguf.control.model_info import (
    FIRST_PART,
    FLOAT_WEIGHTS,
    ModelInfo,
    model_parts,
    read_model_header,
)
from alignez_gguf.errors import ModelFileError
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.bindings import captured_log

_CPUS = Path("/sys/devices/system/cpu")
_MOST_READ = 0.5
"""Share of the physical memory that a file may have to be read; a larger one is mapped."""


class Model(Closing):
    """The weights of a model, which any number of contexts can share.

    Args:
        path: the GGUF file; of a split model, its first part.
        n_gpu_layers: the layers that a GPU holds; -1 for all, which means none where there is no GPU.
        optimize_for_batches: whether mostly many tokens are computed at once, and not one or a few.

    Raises:
        ModelFileError: the file or a part of it is missing, truncated or not a GGUF, the model writes no
            text, or its architecture is unknown.
    """

    def __init__(
        self, path: str | PathLike[str], *, n_gpu_layers: int = -1, optimize_for_batches: bool = False
    ) -> None:
        self._pointer: Any = None
        header = read_model_header(Path(path))
        self.info = ModelInfo.from_header(Path(path), header)
        model_parts(Path(path), header)  # says what is wrong with a part better than llama.cpp's log
        _initialise()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = n_gpu_layers
        self.uses_gpu = n_gpu_layers != 0 and bindings.has_gpu()
        if not self.uses_gpu and _disable_mmap(Path(path), self.info.quantization):
            parameters.load_mode = llama.LLAMA_LOAD_MODE_NONE
        if not self.uses_gpu and optimize_for_batches and _skip_weight_repacking(self.info.quantization):
            parameters.use_extra_bufts = False
        with captured_log() as log:
            self._pointer = llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._pointer:
            raise ModelFileError(
                f"llama.cpp cannot load {path}: {log.reason()}; convert the model for llama-cpp-python "
                f"{llama_cpp.__version__}"
            )
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        self._vocab: Any = llama.llama_model_get_vocab(self._pointer)
        self._pieces: dict[int, bytes] = {}
        self.n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        self.n_bytes = int(llama.llama_model_size(self._pointer))
        """The bytes of all weights, in every part of a split model."""
        self.n_ctx_train = int(llama.llama_model_n_ctx_train(self._pointer))
        self.adds_bos = bool(llama.llama_vocab_get_add_bos(self._vocab))
        self._adds_end = bool(
            llama.llama_vocab_get_add_eos(self._vocab) or llama.llama_vocab_get_add_sep(self._vocab)
        )
        self.bos = int(llama.llama_vocab_bos(self._vocab))
        self.eos = int(llama.llama_vocab_eos(self._vocab))

    @property
    def pointer(self) -> Any:
        """The `llama_model *`. Raises `ValueError` once the model is closed."""
        if not self._pointer:
            raise ValueError("the model is closed")
        return self._pointer

    @property
    def cache_bytes(self) -> int:
        """The bytes of one token in a KV cache in F16; an estimate where layers differ."""
        n_head = max(1, llama.llama_model_n_head(self.pointer))
        n_head_kv = max(1, llama.llama_model_n_head_kv(self.pointer))
        widths = (
            self.metadata(f"{self.info.arch}.attention.{part}_length") or self.info.n_embd // n_head
            for part in ("key", "value")
        )
        return int(2 * self.info.n_layer * n_head_kv * sum(map(int, widths)))

    def metadata(self, key: str) -> str | None:
        """The value of a metadata key as text, or None where the file has no such key."""
        length = llama.llama_model_meta_val_str(self.pointer, key.encode(), None, 0)
        if length < 0:
            return None
        buffer = ctypes.create_string_buffer(length + 1)
        llama.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", errors="replace")

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with the start token where the model wants one; special tokens are read.

        A text that brings the start token itself, as chat templates do, does not get a second one. Half
        characters (lone surrogates) become question marks.
        """
        data = text.encode("utf-8", errors="replace")
        pointer, n_tokens = self.pointer and self._vocab, len(data) + 2
        tokens = (llama.llama_token * n_tokens)()
        # llama.cpp warns of a second start token at every prompt (llama-vocab.cpp, check_double_bos_eos).
        brings_bos = self.adds_bos and text.startswith(self.token_text(self.bos))
        wants_bos = not brings_bos or self._adds_end
        count = llama.llama_tokenize(pointer, data, len(data), tokens, n_tokens, wants_bos, True)
        found: list[int] = tokens[:count]
        return found[1:] if wants_bos and self.adds_bos and found[:2] == [self.bos, self.bos] else found

    def piece(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters; none for a special token."""
        piece = self._pieces.get(token)
        if piece is None:
            buffer = ctypes.create_string_buffer(64)
            pointer = self.pointer and self._vocab
            length = llama.llama_token_to_piece(pointer, token, buffer, len(buffer), 0, False)
            if length < 0:
                buffer = ctypes.create_string_buffer(-length)
                length = llama.llama_token_to_piece(pointer, token, buffer, len(buffer), 0, False)
            piece = self._pieces[token] = buffer.raw[:length]
        return piece

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no character become the replacement character."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it, special ones too; empty for -1, no token."""
        if token < 0:
            return ""
        return str(llama.llama_vocab_get_text(self.pointer and self._vocab, token).decode("utf-8", "replace"))

    def ends_text(self, token: int) -> bool:
        """Whether the model ends its text with this token."""
        return bool(llama.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free the weights. Contexts of this model must be closed before."""
        if self._pointer:
            llama.llama_model_free(self._pointer)
            self._pointer = self._vocab = None


def _disable_mmap(path: Path, quantization: str) -> bool:
    """Whether weights that the CPU computes with take less memory where the file is read, not mapped.

    ggml's kernels rearrange most quantized weights in a copy (ggml-cpu/repack.cpp, ggml-cpu/amx), and a file
    that is mapped stays in memory beside it. A large file and one in parts are mapped all the same: what does
    not fit there can still be computed with then.
    """
    in_parts = FIRST_PART.fullmatch(path.name) is not None
    if quantization in {"", *FLOAT_WEIGHTS} or in_parts or not hasattr(os, "sysconf"):
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return path.stat().st_size < _MOST_READ * memory


def _skip_weight_repacking(quantization: str) -> bool:
    """Whether ggml computes many tokens faster with weights that it has not rearranged for its kernels.

    Of K-quants on a CPU with VNNI (ggml-cpu/tiled/tiled.cpp): 96 tokens take 0.7 of the time so, 8 tokens 1.3
    of it, and one 1.04. With AVX2 alone nothing is gained, and the kernels for AMX want one of their own.
    """
    features = bindings.cpu_features()
    return "_K" in quantization and "AVX512_VNNI" in features and "AMX_INT8" not in features


@cache
def _initialise() -> None:
    bindings.require_supported()
    llama.llama_backend_init()
    # llama-cpp-python prints all of llama.cpp's log to stderr unless its level is set.
    logger = logging.getLogger("llama-cpp-python")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)


def physical_cores() -> int:
    """Return the number of threads to compute with: one for each physical core that this process may use.

    Hyper-threads share the vector units that matrix products saturate, so a second one a core only gets in
    the way. Where the system does not tell, the number of logical ones.
    """
    if sys.platform == "linux":
        return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    if sys.platform == "darwin":
        # Cores of the fast kind only: a product waits for its slowest thread.
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            answer = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
            if answer.returncode == 0 and answer.stdout.strip().isdigit():
                return int(answer.stdout)
    return os.cpu_count() or 1


def _siblings(cpu: int) -> str:
    """The logical processors of one core, as the kernel lists them."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
