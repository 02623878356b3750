"""Runs a model in float32, float16 or bfloat16 through transformers, on the CPU or on GPUs.

Needs no llama.cpp. It is the same `Engine` as that of a GGUF file, so that what is fitted on the one can be
exported for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from os import PathLike
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignez_gguf.closing import Closing
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.engines.base import Completion, GenerationRequest, Passage, Sampling
from alignez_gguf.engines.tokens import passage_tokens, prompt_tokens, response_tokens
from alignez_gguf.engines.transformers.edit_scoring import TransformersEditScorer
from alignez_gguf.engines.transformers.generation import TokenizedRequest, generate_batches
from alignez_gguf.engines.transformers.model import TorchModel, hidden
from alignez_gguf.errors import ModelFileError, SteeringError
from alignez_gguf.readout import HOOKS, Hook, Pooling, Readout
from alignez_gguf.selection.scoring import ANSWER_TOKENS

_DEFAULT_CONTEXT = 1024
_MAX_LOGITS = 1 << 27
"""The most logits that are held at once: half a gigabyte in float32."""

_MAX_FLOAT16 = float(np.finfo(np.float16).max)

_Item = TypeVar("_Item")


class TransformersEngine(Closing):
    """A transformers model that generates texts and reads hidden states.

    A completion depends on its prompt and seed alone, but for the rounding of batched products.

    Args:
        source: a directory or a hub id.
        dtype: the type of the weights: "auto" for that of the file, or "float32", "float16", "bfloat16".
        device_map: as transformers has it; "auto" takes the GPUs there are, or the CPU.
        n_ctx: the longest prompt and completion together, in tokens. Default: 1024, or what the model was
            trained for if that is less.
        n_parallel: the most texts that are computed together.

    Raises:
        ModelFileError: there is no such model, or it is not complete.
        MissingExtraError: transformers is missing.
    """

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        dtype: str = "auto",
        device_map: Any = "auto",
        n_ctx: int | None = None,
        n_parallel: int = 32,
    ) -> None:
        self.model = TorchModel(source, dtype=dtype, device_map=device_map)
        self.n_ctx = n_ctx or min(_DEFAULT_CONTEXT, self.model.n_ctx_train)
        self.n_parallel = max(1, n_parallel)

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete all requests; see `Engine`. Prompts are checked before anything is computed."""
        if any(request.strength != 0 for request in requests):
            raise SteeringError("a transformers model writes unsteered; use a GGUF file to steer")
        tokenize = self.model.tokenize
        tokenized = [
            TokenizedRequest(
                index,
                prompt_tokens(tokenize, request.prompt, self.n_ctx, sampling.max_tokens),
                request.seed,
            )
            for index, request in enumerate(requests)
        ]
        return generate_batches(self.model, self.n_parallel, tokenized, sampling, on_text)

    @property
    def hooks(self) -> Collection[Hook]:
        """The hidden states that can be read of every layer of this architecture."""
        readable = set[Hook]()
        for hook in HOOKS:
            with suppress(ModelFileError):
                self._modules(hook)
                readable.add(hook)
        return readable

    def activations(
        self, passages: Sequence[Passage], readouts: Sequence[Readout]
    ) -> Iterator[NDArray[np.float16]]:
        """Yield the hidden states of each passage; see `Engine`."""
        modules = [self._modules(readout.hook) for readout in readouts]
        texts = [passage_tokens(self.model.tokenize, passage, self.n_ctx) for passage in passages]
        return (
            array
            for batch in _batches(texts, self.n_parallel)
            for array in self._activations(batch, readouts, modules)
        )

    def response_logprobs(
        self, passages: Sequence[Passage], *, max_tokens: int | None = None
    ) -> Iterator[float]:
        """Yield log P(response | prompt) of each passage; see `Engine`."""
        texts = [
            response_tokens(self.model.tokenize, passage, self.n_ctx, max_tokens) for passage in passages
        ]
        longest = max((len(tokens) - first for tokens, first in texts), default=1)
        return (
            value
            for batch in _batches(texts, self._rows_of_logits(longest))
            for value in self._response_logprobs(batch)
        )

    def next_token_logprobs(self, prompts: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Yield the log-probabilities of the token after each prompt; see `Engine`."""
        rows = [prompt_tokens(self.model.tokenize, prompt, self.n_ctx) for prompt in prompts]
        return (
            array
            for batch in _batches(rows, self._rows_of_logits(1))
            for array in self._logprobs(batch, 1)[:, 0].cpu().numpy()
        )

    def steered(self, passages: Sequence[Passage]) -> TransformersEditScorer:
        """Return a scorer of many edits along the same answers; see `TransformersEditScorer`."""
        return TransformersEditScorer(
            self.model,
            passages,
            n_ctx=self.n_ctx,
            n_parallel=self._rows_of_logits(1 + ANSWER_TOKENS),
        )

    def close(self) -> None:
        """Forget the model; its memory is freed with the last reference to it."""
        del self.model

    def _modules(self, hook: Hook) -> Sequence[nn.Module]:
        return self.model.mlps if hook == "mlp" else self.model.blocks

    def _rows_of_logits(self, n_tokens: int) -> int:
        """Return how many rows with logits for `n_tokens` tokens each are computed together."""
        return max(1, min(self.n_parallel, _MAX_LOGITS // (n_tokens * int(self.model.config.vocab_size))))

    @torch.inference_mode()
    def _activations(
        self,
        texts: Sequence[tuple[list[int], int]],
        readouts: Sequence[Readout],
        modules: Sequence[Sequence[nn.Module]],
    ) -> NDArray[np.float16]:
        """Return what the `modules` of each readout put out, [n_texts, n_readouts, n_layer, n_embd]."""
        width = max(len(tokens) for tokens, _ in texts)

        def taking(pooling: Pooling, layers: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
            """A hook that appends what a layer puts out, [n_texts, n_embd]."""

            def forward_hook(_: nn.Module, __: Any, output: Any) -> None:
                states = hidden(output, width, self.info.n_embd)
                rows = []
                for row, (tokens, first) in enumerate(texts):
                    begin = first if pooling == "mean" else len(tokens) - 1
                    rows.append(states[row, begin : len(tokens)].float().mean(0))
                layers.append(torch.stack(rows).cpu())

            return forward_hook

        outputs: list[list[Tensor]] = [[] for _ in readouts]
        with ExitStack() as hooks:
            for readout, layers, hooked in zip(readouts, outputs, modules, strict=True):
                for module in hooked:
                    hooks.callback(module.register_forward_hook(taking(readout.pooling, layers)).remove)
            self.model.run([tokens for tokens, _ in texts])
        array = torch.stack([torch.stack(layers, dim=1) for layers in outputs], dim=1)
        # Massive activations of some models exceed float16.
        return np.asarray(array.clamp(-_MAX_FLOAT16, _MAX_FLOAT16).numpy(), np.float16)

    @torch.inference_mode()
    def _response_logprobs(self, texts: Sequence[tuple[list[int], int]]) -> list[float]:
        n_last = max(len(tokens) - first for tokens, first in texts)
        logprobs = self._logprobs([tokens[:-1] for tokens, _ in texts], n_last)
        sums = []
        for row, (tokens, first) in enumerate(texts):
            expected = torch.tensor(tokens[first:], device=logprobs.device)
            logprobs_of_row = logprobs[row, -len(expected) :].gather(1, expected[:, None])
            sums.append(sum(logprobs_of_row[:, 0].tolist()))
        return sums

    @torch.inference_mode()
    def _logprobs(self, rows: Sequence[list[int]], n_last: int) -> Tensor:
        """Return the log-probabilities after the last tokens of each row, [n_rows, n_last, n_vocab]."""
        logits, _ = self.model.logits(self.model.padded(rows), n_last)
        return logits.log_softmax(-1)


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))
