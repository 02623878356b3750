"""A session of `verify`: one context and one short prompt, decoded under different edits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.closing import Closing
from alignez_gguf.control.edits import Edits
from alignez_gguf.errors import QueryError
from alignez_gguf.exporters import stock
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.layer_reader import LayerReader, Observation
from alignez_gguf.runtime.model import Model
from alignez_gguf.steering.patched import Patched, SteeringBackend
from alignez_gguf.steering.stock_adapters import StockAdapters

Way = Literal["patched", "stock"]
"""The way of edits into llama.cpp: through the patch, or through a LoRA and a control vector."""


class VerificationSession(Closing):
    """Decodes the first `n_prompt` tokens of a prompt, and up to `n_answer` greedy ones after it.

    Raises:
        ModelFileError: the model cannot be loaded.
        QueryError: the prompt has no tokens.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        prompt: str,
        *,
        n_prompt: int,
        n_answer: int,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
    ) -> None:
        self._path = Path(model_path)
        self._n_answer = n_answer
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(model_path, n_gpu_layers=n_gpu_layers))
            self.info = self.model.info
            self._tokens = self.model.tokenize(prompt)[:n_prompt]
            if not self._tokens:
                raise QueryError(
                    "the prompt is empty, and this model has no token to begin with; give it text"
                )
            self._reader = LayerReader(self.info)
            self._context = opened.enter_context(
                Context(
                    self.model,
                    n_ctx=len(self._tokens) + n_answer,
                    n_threads=n_threads,
                    on_node=self._reader.on_node,
                )
            )
            self._opened = opened.pop_all()

    @cached_property
    def weights(self) -> ModelWeights:
        return ModelWeights(self._path)

    def close(self) -> None:
        self._opened.close()

    @contextmanager
    def steered(self, way: Way, edits: Edits) -> Iterator[SteeringBackend]:
        """Edit every token at strength 1 inside the context, and yield the backend.

        Raises:
            SteeringError: llama.cpp cannot apply the edits this way.
            RuntimeUnavailableError: the patch is asked for and missing.
        """
        with tempfile.TemporaryDirectory() as folder:
            backend = self._backend(way, edits, Path(folder))
            try:
                self.set_strength(backend, 1.0)
                yield backend
            finally:
                backend.detach()

    def set_strength(self, backend: SteeringBackend, strength: float) -> None:
        """Set the strength of every token, from the next decode on."""
        backend.steer(strength, range(len(self._tokens) + self._n_answer))

    def logits(self, at_once: int | None = None) -> NDArray[np.float32]:
        """Return the logits [n_tokens, n_vocab] of the prompt.

        Args:
            at_once: number of tokens that are decoded at a time; None decodes them all.
        """
        self._context.clear()
        count = len(self._tokens)
        rows = []
        for start in range(0, count, at_once or count):
            positions = np.arange(start, min(start + (at_once or count), count))
            self._decode(positions)
            rows += [self._context.logits(index).copy() for index in range(len(positions))]
        return np.stack(rows)

    def observe(self) -> tuple[NDArray[np.float32], Observation]:
        """Return the logits [n_tokens, n_vocab] of the prompt, and its MLP and block outputs."""
        observation = self._reader.observe(self._decode_prompt, len(self._tokens))
        return np.stack([self._context.logits(index) for index in range(len(self._tokens))]), observation

    def greedy(self) -> str:
        """Return the continuation of the prompt by the likeliest tokens."""
        self._decode_prompt()
        answer: list[int] = []
        index = len(self._tokens) - 1
        while len(answer) < self._n_answer:
            token = int(self._context.logits(index).argmax())
            if self.model.ends_text(token):
                break
            answer.append(token)
            self._context.decode([token], [len(self._tokens) + len(answer) - 1], [0], [True])
            index = 0
        return self.model.detokenize(answer)

    def _decode_prompt(self) -> None:
        self._context.clear()
        self._decode(np.arange(len(self._tokens)))

    def _decode(self, positions: NDArray[np.int_]) -> None:
        tokens = [self._tokens[position] for position in positions]
        self._context.decode(tokens, positions, np.zeros(len(tokens)), np.ones(len(tokens)))

    def _backend(self, way: Way, edits: Edits, folder: Path) -> SteeringBackend:
        if way == "patched":
            return Patched(self._context.pointer, edits)
        lora = None
        if any(edit.remove is not None for edit in edits.values()):
            lora = folder / "lora.gguf"
            stock.write_lora(edits, self.weights, lora)
        additions = stock.additions(edits, self.weights)
        return StockAdapters(self._context.pointer, self.model.pointer, lora=lora, additions=additions)
