"""Measures many edits of a transformers model along the same answers, for the search.

The edits act through forward hooks: a removal on the output of the MLP, an addition on that of the block, as
`alignez_gguf.control.edits` defines them. The prompts are computed once and their keys and values are kept:
enough where only the last prompt token and what follows it is steered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignez_gguf.closing import Closing
from alignez_gguf.control.edits import Edits
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.tokens import passage_tokens, steered_tokens
from alignez_gguf.engines.transformers.hooks import TensorEdit, edit_columns, hook_edits
from alignez_gguf.engines.transformers.model import PaddedBatch, TorchModel, hidden
from alignez_gguf.errors import SteeringError
from alignez_gguf.selection.scoring import ANSWER_TOKENS


@dataclass(frozen=True)
class _Text:
    """A prompt and the beginning of an answer, as tokens."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, eq=False)
class _Group:
    """Texts that are computed together.

    Attributes:
        answers: of each text.
        prompts: whole.
        ends: their last tokens, with the mask of all.
        cache: keys and values of all before the last tokens, unsteered.
    """

    answers: list[list[int]]
    prompts: PaddedBatch
    ends: PaddedBatch
    cache: Any


class TransformersEditScorer(Closing):
    """Measures the likelihoods of the same answers under one edit after the other.

    Satisfies `scoring.SteeredModel`.

    Args:
        model: outlives this object.
        passages: prompts and their answers.
        n_ctx: the longest prompt and answer together.
        n_parallel: how many passages are computed together.

    Raises:
        QueryError: a prompt has fewer than two tokens, an answer has none, or a passage does not fit into
            the context.
    """

    def __init__(
        self, model: TorchModel, passages: Sequence[Passage], *, n_ctx: int, n_parallel: int
    ) -> None:
        self._model = model
        self._texts = [_text(model, n_ctx, passage) for passage in passages]
        self._n_parallel = n_parallel
        self._groups: dict[tuple[int, ...], _Group] = {}
        """The groups that were computed, by the numbers of their passages: a search asks for them again."""

    @torch.inference_mode()
    def log_likelihoods(
        self, edits: Edits, passages: Sequence[int], *, scope: Scope = GENERATION
    ) -> NDArray[np.float64]:
        """Return log P(answer | prompt) in nat, [n_passages], over at most `ANSWER_TOKENS` tokens each.

        Args:
            edits: by layer; at strength 1.
            passages: the numbers of the passages.
            scope: the tokens that are edited.

        Raises:
            SteeringError: the edits do not fit the model.
        """
        values: list[float] = []
        for first in range(0, len(passages), self._n_parallel):
            numbers = tuple(passages[first : first + self._n_parallel])
            if numbers not in self._groups:
                self._groups[numbers] = self._group([self._texts[number] for number in numbers])
            group = self._groups[numbers]
            rows = self._logprobs(group, edits, scope)
            for row, answer in zip(rows, group.answers, strict=True):
                tokens = torch.tensor(answer, device=row.device)
                values.append(float(row[: len(answer)].gather(-1, tokens[:, None]).double().sum()))
        return np.array(values)

    def close(self) -> None:
        """Forget the keys and values."""
        self._groups = {}

    def _group(self, texts: list[_Text]) -> _Group:
        prompts = self._model.padded([text.prompt for text in texts])
        body = PaddedBatch(prompts.ids[:, :-1], prompts.positions[:, :-1], prompts.mask[:, :-1])
        _, cache = self._model.logits(body, 1)
        ends = PaddedBatch(prompts.ids[:, -1:], prompts.positions[:, -1:], prompts.mask)
        return _Group([text.answer for text in texts], prompts, ends, cache)

    def _logprobs(self, group: _Group, edits: Edits, scope: Scope) -> Tensor:
        """Return the log-probabilities from the end of each prompt on, [n_texts, longest answer, n_vocab].

        Behind the end of an answer the rows mean nothing.
        """
        computed, cache = (group.prompts, None) if scope.kind == "all" else (group.ends, group.cache)
        longest = max(map(len, group.answers))
        # Padded on the right: no token attends to what follows it. The last one predicts nothing.
        padded = torch.tensor(
            [(answer + [0] * (longest - len(answer)))[:-1] for answer in group.answers], dtype=torch.int64
        ).to(computed.ids.device)
        ahead = torch.arange(1, longest, device=padded.device)
        rows = PaddedBatch(
            ids=torch.cat([computed.ids, padded], dim=1),
            positions=torch.cat([computed.positions, computed.positions[:, -1:] + ahead], dim=1),
            mask=torch.cat([computed.mask, torch.ones_like(padded)], dim=1),
        )
        # All prompts end at the same column.
        steered = slice(*scope.positions(computed.ids.shape[1]))
        with edited(self._model, edits, 1.0, steered, rows.ids.shape[1]):
            # A forward pass may write into the cache that it is given.
            logits, _ = self._model.logits(rows, longest, copy.deepcopy(cache))
        return logits.log_softmax(-1)


@contextmanager
def edited(model: TorchModel, edits: Edits, strength: float, columns: slice, width: int) -> Iterator[None]:
    """Inside, a forward pass over rows of `width` tokens is edited at these columns.

    Raises:
        SteeringError: the edits do not fit the model.
        ModelFileError: the MLPs cannot be identified.
    """
    n_layer, n_embd = model.info.n_layer, model.info.n_embd
    edits = {layer: edit for layer, edit in edits.items() if edit.n_embd is not None and strength > 0}
    for layer, edit in edits.items():
        if not 0 <= layer < n_layer or edit.n_embd != n_embd:
            raise SteeringError(
                f"an edit of width {edit.n_embd} in layer {layer} does not fit {model.info}; "
                "use one that was made for this model"
            )

    def change(states: Tensor, edit: TensorEdit) -> Tensor:
        rows = hidden(states, width, n_embd)
        return edit_columns(rows, columns, edit, strength).reshape(states.shape)

    with ExitStack() as hooks:
        hook_edits(hooks, edits, lambda: model.mlps, model.blocks, change)
        yield


def _text(model: TorchModel, n_ctx: int, passage: Passage) -> _Text:
    passage_tokens(model.tokenize, passage, n_ctx)  # to see that it fits
    return _Text(*steered_tokens(model.tokenize, passage, ANSWER_TOKENS))
