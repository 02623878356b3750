"""Off-the-shelf sentence embedders: GGUF files, or models of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.gguf_header import GgufError, read_header
from alignez_gguf.control.model_kind import require_embedder
from alignez_gguf.errors import ModelFileError
from alignez_gguf.pairs.pairs import PreferencePair

_MOST_TOKENS = 512
"""Non-causal models see a text in one piece, so it has to fit into one batch."""


class Embedder(Protocol):
    """Turns texts into vectors."""

    def embed(self, text: str) -> NDArray[np.float32]:
        """The vector of a text, [n_dimensions]."""
        ...


class GgufEmbedder:
    """An embedding model as a GGUF file; models without a pooling of their own are averaged over tokens.

    Of a longer text, the first 512 tokens are embedded, or fewer where the model knows fewer positions.

    Raises:
        ModelFileError: llama.cpp cannot load the file, or not embed texts with it.
    """

    def __init__(self, path: Path, *, n_threads: int | None = None, n_gpu_layers: int = -1) -> None:
        from llama_cpp import Llama

        from alignez_gguf.runtime.bindings import captured_log

        n_tokens = _n_tokens(path)
        try:
            with captured_log():
                self._llm: Any = Llama(
                    str(path),
                    embedding=True,
                    n_ctx=n_tokens,
                    n_batch=n_tokens,
                    n_ubatch=n_tokens,
                    n_threads=n_threads,
                    n_gpu_layers=n_gpu_layers,
                    verbose=False,
                )
        except ValueError as error:
            raise ModelFileError(f"llama.cpp cannot load the embedding model {path}: {error}") from error

    def embed(self, text: str) -> NDArray[np.float32]:
        vectors = np.asarray(self._llm.embed(text, normalize=True, truncate=True), np.float32)
        return vectors if vectors.ndim == 1 else np.asarray(vectors.mean(axis=0))


class SentenceTransformerEmbedder:
    """A model of sentence-transformers, by the name it has on the hub or by its folder.

    Raises:
        ModelFileError: sentence-transformers is not installed, or has no such model.
    """

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelFileError(
                f"the embedder {name} needs sentence-transformers; pip install sentence-transformers, or "
                "give an embedding model as a .gguf file"
            ) from error
        try:
            self._model: Any = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"sentence-transformers cannot load {name}: {str(error).splitlines()[0]}"
            ) from error

    def embed(self, text: str) -> NDArray[np.float32]:
        return np.asarray(self._model.encode(text, show_progress_bar=False), np.float32)


def _n_tokens(path: Path) -> int:
    """How many tokens of a text the model in a GGUF file can see at once."""
    try:
        metadata = read_header(path).metadata
    except OSError as error:
        raise ModelFileError(
            f"cannot read the embedding model {path}: {error.strerror or error}; give a .gguf file"
        ) from error
    except GgufError as error:
        raise ModelFileError(
            f"{path} is not a usable GGUF model: {error}; download or convert the model again"
        ) from error
    require_embedder(str(metadata.get("general.architecture")), str(path))
    known = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return min(_MOST_TOKENS, known) if isinstance(known, int) and known > 0 else _MOST_TOKENS


def open_embedder(name: str, *, n_threads: int | None = None, n_gpu_layers: int = -1) -> Embedder:
    """The embedder of a file that ends in .gguf, or of a name. Raises `ModelFileError`."""
    if name.lower().endswith(".gguf"):
        return GgufEmbedder(Path(name), n_threads=n_threads, n_gpu_layers=n_gpu_layers)
    return SentenceTransformerEmbedder(name)


def embed_pairs(
    embedder: Embedder, pairs: Sequence[PreferencePair], advance: Callable[[int], None] = lambda _: None
) -> NDArray[np.float32]:
    """Each query with its helpful and with its harmful answer, [2, n_pairs, n_dimensions]."""
    rows = []
    for pair in pairs:
        rows.append([embedder.embed(f"{pair.query}\n{answer}") for answer in (pair.helpful, pair.harmful)])
        advance(1)
    both: NDArray[np.float32] = np.asarray(rows, np.float32).swapaxes(0, 1)
    return both
