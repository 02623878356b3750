"""A steered transformers model as the selection measures it: many edits over the same prompts.

The edits act through forward hooks: a removal on the output of the MLP, an addition on that of the block, as
`alignez_gguf.edits` defines them. The prompts are computed once and their keys and values are kept: enough
where only the last prompt token and what follows it is steered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignez_gguf.edits import Edits
from alignez_gguf.engines import Passage
from alignez_gguf.engines.passages import passage_tokens
from alignez_gguf.engines.transformers_model import Padded, TorchModel, hidden
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.scope import GENERATION, Scope
from alignez_gguf.scoring import (
    ANSWER_TOKENS,
    DIVERGENCE_QUERIES,
    NO_LIMITS,
    Divergence,
    Limits,
    Steering,
    token_divergence,
)


@dataclass(frozen=True)
class _Query:
    prompt: list[int]
    base_answer: list[int]
    helpful_answer: list[int]


@dataclass(frozen=True, eq=False)
class _Group:
    """Queries that are computed together.

    Attributes:
        prompts: whole.
        ends: their last tokens, with the mask of all.
        cache: keys and values of all before the last tokens, unsteered.
    """

    queries: list[_Query]
    prompts: Padded
    ends: Padded
    cache: Any


class SteeredPrompts:
    """Prompts whose keys and values are kept while edits come and go; satisfies `scoring.SteeredModel`.

    Args:
        model: outlives this object.
        prompts: plain prompts, one for each query.
        base_answers: the base model's own answers to them.
        helpful_answers: those of the helpful persona.
        n_ctx: the longest prompt and answer together.
        n_parallel: how many queries are computed together.

    Raises:
        QueryError: a prompt has fewer than two tokens or does not fit into the context.
    """

    def __init__(
        self,
        model: TorchModel,
        prompts: Sequence[str],
        base_answers: Sequence[str],
        helpful_answers: Sequence[str],
        *,
        n_ctx: int,
        n_parallel: int,
    ) -> None:
        self._model = model
        texts = zip(prompts, base_answers, helpful_answers, strict=True)
        self._queries = [_query(model, n_ctx, *query) for query in texts]
        self._groups = [
            self._group(self._queries[first : first + n_parallel])
            for first in range(0, len(self._queries), n_parallel)
        ]

    @torch.inference_mode()
    def first_token_logprobs(
        self, steerings: Sequence[Steering], *, scope: Scope = GENERATION
    ) -> NDArray[np.float32]:
        """Log-probabilities of the first token of the answer, [n_steerings, n_queries, n_vocab].

        The scope `all` computes the prompts anew.
        """

        def logprobs(group: _Group, steering: Steering) -> NDArray[np.float32]:
            no_answers: list[list[int]] = [[]] * len(group.queries)
            found = self._logprobs(group, no_answers, *steering, scope)[:, 0]
            return np.asarray(found.cpu().numpy(), np.float32)

        return np.stack(
            [np.concatenate([logprobs(group, steering) for group in self._groups]) for steering in steerings]
        )

    @torch.inference_mode()
    def divergence(
        self, edits: Edits, limits: Limits = NO_LIMITS, *, scope: Scope = GENERATION
    ) -> Divergence:
        """KL(P_base || P_steered), teacher-forced along the answers and to what follows them.

        Ends once it exceeds a limit; see `SteeredModel`.
        """
        measured = self._queries[:DIVERGENCE_QUERIES]
        n_tokens = sum(1 + len(query.base_answer) for query in measured)
        return token_divergence(
            self._divergences(lambda query: query.helpful_answer, edits, scope),
            self._divergences(lambda query: query.base_answer, edits, scope),
            len(measured),
            n_tokens,
            limits,
        )

    def close(self) -> None:
        """Forget the keys and values."""
        self._groups = []

    def __enter__(self) -> SteeredPrompts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.inference_mode()
    def _group(self, queries: list[_Query]) -> _Group:
        prompts = self._model.padded([query.prompt for query in queries])
        body = Padded(prompts.ids[:, :-1], prompts.positions[:, :-1], prompts.mask[:, :-1])
        _, cache = self._model.logits(body, 1)
        ends = Padded(prompts.ids[:, -1:], prompts.positions[:, -1:], prompts.mask)
        return _Group(queries, prompts, ends, cache)

    def _divergences(
        self, answer_of: Callable[[_Query], list[int]], edits: Edits, scope: Scope
    ) -> Iterator[list[float]]:
        """The divergence at each token of each answer, and at what follows it."""
        left = DIVERGENCE_QUERIES
        for group in self._groups:
            if left <= 0:
                return
            answers = [answer_of(query) for query in group.queries]
            base = self._logprobs(group, answers, {}, 1.0, scope)
            steered = self._logprobs(group, answers, edits, 1.0, scope)
            each = (base.exp() * (base - steered)).sum(-1).tolist()
            for row, answer in zip(each[:left], answers, strict=False):
                yield row[: 1 + len(answer)]
            left -= len(answers)

    def _logprobs(
        self, group: _Group, answers: Sequence[list[int]], edits: Edits, strength: float, scope: Scope
    ) -> Tensor:
        """What follows the prompt and each token of the answer, [n_queries, 1 + longest answer, n_vocab].

        Behind the end of an answer the rows mean nothing.
        """
        computed, cache = (group.prompts, None) if scope.kind == "all" else (group.ends, group.cache)
        longest = max(map(len, answers))
        # Padded on the right: no token attends to what follows it.
        padded = torch.tensor(
            [answer + [0] * (longest - len(answer)) for answer in answers], dtype=torch.int64
        ).to(computed.ids.device)
        ahead = torch.arange(1, longest + 1, device=padded.device)
        rows = Padded(
            ids=torch.cat([computed.ids, padded], dim=1),
            positions=torch.cat([computed.positions, computed.positions[:, -1:] + ahead], dim=1),
            mask=torch.cat([computed.mask, torch.ones_like(padded)], dim=1),
        )
        # All prompts end at the same column.
        steered = slice(*scope.positions(computed.ids.shape[1]))
        with edited(self._model, edits, strength, steered, rows.ids.shape[1]):
            # A forward pass may write into the cache that it is given.
            logits, _ = self._model.logits(rows, 1 + longest, copy.deepcopy(cache))
        return logits.log_softmax(-1)


@contextmanager
def edited(model: TorchModel, edits: Edits, strength: float, columns: slice, width: int) -> Iterator[None]:
    """Inside, a forward pass over rows of `width` tokens is edited at these columns.

    Raises:
        SteeringError: the edits do not fit the model.
        ModelFileError: the MLPs cannot be told.
    """
    n_layer, n_embd = model.info.n_layer, model.info.n_embd
    with ExitStack() as hooks:
        for layer, edit in edits.items():
            if edit.n_embd is None or strength == 0:
                continue
            if not 0 <= layer < n_layer or edit.n_embd != n_embd:
                raise SteeringError(
                    f"an edit of width {edit.n_embd} in layer {layer} does not fit {model.info}; "
                    "use one that was made for this model"
                )
            if edit.remove is not None:
                _hook(hooks, model.mlps[layer], _removal(edit.remove, strength), columns, width, n_embd)
            if edit.add is not None:
                _hook(hooks, model.blocks[layer], _addition(edit.add, strength), columns, width, n_embd)
        yield


def _removal(remove: NDArray[np.float32], strength: float) -> Callable[[Tensor], Tensor]:
    """x - s V^T V x."""
    v = torch.tensor(remove)

    def edit(x: Tensor) -> Tensor:
        rows = v.to(x.device)
        return x - strength * (x @ rows.T) @ rows

    return edit


def _addition(add: NDArray[np.float32], strength: float) -> Callable[[Tensor], Tensor]:
    """h + s add."""
    vector = strength * torch.tensor(add)
    return lambda h: h + vector.to(h.device)


def _hook(
    hooks: ExitStack,
    module: nn.Module,
    edit: Callable[[Tensor], Tensor],
    columns: slice,
    width: int,
    n_embd: int,
) -> None:
    """Edit what a module puts out, in float32, whatever its own type."""

    def forward_hook(_: nn.Module, __: Any, output: Any) -> Any:
        states = hidden(output, width, n_embd).clone()
        states[:, columns] = edit(states[:, columns].float()).to(states.dtype)
        states = states.reshape((output[0] if isinstance(output, tuple) else output).shape)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hooks.callback(module.register_forward_hook(forward_hook).remove)


def _query(model: TorchModel, n_ctx: int, prompt: str, base_answer: str, helpful_answer: str) -> _Query:
    def tokens_of(answer: str) -> tuple[list[int], list[int]]:
        tokens, _ = passage_tokens(model.tokenize, Passage(prompt, answer), n_ctx)
        return tokens[:n_prompt], tokens[n_prompt:][:ANSWER_TOKENS]

    prompt_tokens, _ = passage_tokens(model.tokenize, Passage(prompt), n_ctx)
    n_prompt = len(prompt_tokens)
    if n_prompt < 2:
        raise QueryError(f"the prompt {prompt!r} is too short to steer its answer; give a longer query")
    return _Query(prompt_tokens, tokens_of(base_answer)[1], tokens_of(helpful_answer)[1])
