"""The edits as PyTorch forward hooks: what llama.cpp must compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from alignez_gguf.control.edits import LayerEdit
from tests.models import TinyModel


def hooked_logits(
    model: TinyModel,
    tokens: Sequence[int] | torch.Tensor,
    edits: Mapping[int, LayerEdit],
    strengths: float | Sequence[float] = 1.0,
) -> NDArray[np.float32]:
    """Logits [n_tokens, n_vocab] of the PyTorch model, each token edited at its own strength.

    Instead of tokens, their embeddings [n_tokens, n_embd].
    """
    return nested_logits(model, tokens, [(edits, strengths)])


def nested_logits(
    model: TinyModel,
    tokens: Sequence[int] | torch.Tensor,
    controls: Sequence[tuple[Mapping[int, LayerEdit], float | Sequence[float]]],
) -> NDArray[np.float32]:
    """The same under several controls, each hooked after the one before it."""
    with ExitStack() as hooks, torch.no_grad():
        for edits, strengths in controls:
            _edit(hooks, model, edits, torch.tensor(strengths).expand(len(tokens))[None, :, None])
        if isinstance(tokens, torch.Tensor):
            output = model.hf(inputs_embeds=tokens[None])
        else:
            output = model.hf(torch.tensor([list(tokens)]))
        logits: NDArray[np.float32] = output.logits[0].numpy()
    return logits


def _edit(hooks: ExitStack, model: TinyModel, edits: Mapping[int, LayerEdit], strength: torch.Tensor) -> None:
    for layer, edit in edits.items():
        if edit.remove is not None:
            v = torch.tensor(edit.remove)
            if edit.gain is None:
                _hook(hooks, model.mlp_modules[layer], lambda x, v=v: x - strength * (x @ v.T @ v))
            else:
                u = v * torch.tensor(edit.gain)[:, None]
                _hook(hooks, model.mlp_modules[layer], lambda x, v=v, u=u: x + strength * (x @ v.T @ u))
        if edit.bias is not None:
            bias = torch.tensor(edit.bias)
            _hook(hooks, model.mlp_modules[layer], lambda x, bias=bias: x + strength * bias)
        if edit.add is not None:
            add = torch.tensor(edit.add)
            _hook(hooks, model.blocks[layer], lambda h, add=add: h + strength * add)


def _hook(hooks: ExitStack, module: nn.Module, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def forward_hook(_: nn.Module, __: Any, output: Any) -> Any:
        # A mixture of experts also returns its routing.
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    hooks.callback(module.register_forward_hook(forward_hook).remove)
