"""Generates many texts at once with a transformers model.

What a text becomes depends on its own prompt and seed, but for the rounding of batched products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignez_gguf.engines.base import Completion, Sampling
from alignez_gguf.engines.completion import StreamingCompletion
from alignez_gguf.engines.transformers.model import PaddedBatch, TorchModel

_CONTEXT_TOKENS = 4
"""Tokens of the prompt that decide how the first generated ones are spelled."""

_UNKNOWN_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class TokenizedRequest:
    """A request whose prompt is tokenized.

    Attributes:
        index: its number among all requests.
        tokens: the prompt.
        seed: the seed of its draws.
    """

    index: int
    tokens: list[int]
    seed: int


def generate_batches(
    model: TorchModel,
    n_parallel: int,
    requests: Sequence[TokenizedRequest],
    sampling: Sampling,
    on_text: Callable[[int, str], None] | None,
) -> Iterator[tuple[int, Completion]]:
    """Complete all requests, `n_parallel` at a time; yield each with its index when it is finished.

    Prompts of like length are batched, the longest first, so that little is spent on padding.
    """
    ordered = sorted(requests, key=lambda request: -len(request.tokens))
    for first in range(0, len(ordered), n_parallel):
        yield from _complete(model, ordered[first : first + n_parallel], sampling, on_text)


@torch.inference_mode()
def _complete(
    model: TorchModel,
    requests: Sequence[TokenizedRequest],
    sampling: Sampling,
    on_text: Callable[[int, str], None] | None,
) -> Iterator[tuple[int, Completion]]:
    running = [_RunningSequence(model, request, sampling, on_text) for request in requests]
    rows = model.padded([request.tokens for request in requests])
    logits, cache = model.logits(rows, 1)
    while True:
        drawn = draw(logits[:, 0], [sequence.generator for sequence in running], sampling)
        for sequence, token in zip(running, drawn, strict=True):
            sequence.take(token)
        left = [index for index, sequence in enumerate(running) if sequence.completion is None]
        for sequence in running:
            if sequence.completion is not None:
                yield sequence.index, sequence.completion
        if not left:
            return
        if len(left) < len(running):
            kept = torch.tensor(left)  # on the CPU: the layers of the cache may lie on several devices
            cache.batch_select_indices(kept)
            rows = PaddedBatch(rows.ids[kept], rows.positions[kept], rows.mask[kept])
            running = [running[index] for index in left]
        rows = PaddedBatch(
            ids=torch.tensor([[sequence.last] for sequence in running], device=model.device),
            positions=rows.positions[:, -1:] + 1,
            mask=torch.cat([rows.mask, rows.mask.new_ones(len(running), 1)], dim=1),
        )
        logits, cache = model.logits(rows, 1, cache)


def draw(logits: Tensor, generators: Sequence[torch.Generator], sampling: Sampling) -> list[int]:
    """Draw a token from each row of `logits` [n_rows, n_vocab]: top-p, then temperature, as llama.cpp does.

    Each row takes one number from its own generator, and that alone decides it.
    """
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1)]
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    cumulative = (logits / sampling.temperature).softmax(-1).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    points = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(total.device)
    tokens = torch.searchsorted(cumulative, points * total, right=True)
    # Rounding can put a point on the total: the last token that is possible has it then.
    return [int(token) for token in tokens.minimum(torch.searchsorted(cumulative, total))[:, 0]]


class _RunningSequence(StreamingCompletion):
    """A request with what has been generated for it, and the generator that draws its tokens."""

    def __init__(
        self,
        model: TorchModel,
        request: TokenizedRequest,
        sampling: Sampling,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        super().__init__(sampling)
        self.index = request.index
        self.generator = torch.Generator().manual_seed(request.seed)
        self._model = model
        self._detokenizer = IncrementalDetokenizer(model.decode, request.tokens)
        self._on_text = on_text

    def take(self, token: int) -> None:
        """Add a token that was drawn."""
        ends = self._model.ends_text(token)
        shown = self.end() if ends else self.add(token, self._detokenizer.add(token))
        if shown and self._on_text is not None:
            self._on_text(self.index, shown)


class IncrementalDetokenizer:
    """Turns tokens into text as they come: how a token is spelled can depend on those before it.

    Args:
        decode: spells a sequence of tokens.
        prompt: the tokens before the first one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._spelled = list(prompt[-_CONTEXT_TOKENS:])
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """Add a token, and return the characters that are complete with it."""
        self._waiting.append(token)
        before = self._decode(self._spelled)
        text = self._decode(self._spelled + self._waiting)
        if len(text) <= len(before) or text.endswith(_UNKNOWN_CHARACTER):
            return ""
        self._spelled, self._waiting = self._waiting, []
        return text[len(before) :]
