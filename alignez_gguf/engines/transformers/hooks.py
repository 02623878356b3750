"""The forward hooks of both ways to steer a transformers model, and the edits of tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from alignez_gguf.control.edits import Edits, LayerEdit

TensorEdit = Callable[[Tensor, float], Tensor]
"""Edits hidden states [..., n_embd] with a strength, in their own type and on their own device."""


def mlp_edit(edit: LayerEdit) -> TensorEdit:
    """Return the edit x + s (V^T G V x + b) of an MLP output; see `edits.apply_to_mlp`."""
    rows = None if edit.remove is None else torch.tensor(edit.remove)
    gains = torch.tensor(edit.gains)
    bias = None if edit.bias is None else torch.tensor(edit.bias)

    def edited(x: Tensor, strength: float) -> Tensor:
        change = x.new_zeros(())
        if rows is not None:
            v = rows.to(x.device)
            change = change + ((x @ v.T) * gains.to(x.device)) @ v
        if bias is not None:
            change = change + bias.to(x.device)
        return x + strength * change

    return edited


def block_edit(edit: LayerEdit) -> TensorEdit:
    """Return the edit h + s a of a block output."""
    assert edit.add is not None
    vector = torch.tensor(edit.add)
    return lambda h, strength: h + strength * vector.to(h.device)


def hook_edits(
    hooks: ExitStack,
    edits: Edits,
    mlps: Callable[[], Sequence[nn.Module]],
    blocks: Sequence[nn.Module],
    edited: Callable[[Tensor, TensorEdit], Tensor],
) -> None:
    """Hook what the MLPs and the blocks of edited layers put out, until `hooks` is closed.

    Args:
        edits: the edit of each layer.
        mlps: gives the MLP of each layer; called where one is edited.
        blocks: the block of each layer.
        edited: applies an edit, at whatever strength, to what a module puts out.
    """
    for layer, edit in edits.items():
        if edit.edits_mlp:
            _hook(hooks, mlps()[layer], mlp_edit(edit), edited)
        if edit.add is not None:
            _hook(hooks, blocks[layer], block_edit(edit), edited)


def edit_columns(states: Tensor, columns: slice, edit: TensorEdit, strength: float) -> Tensor:
    """Return a copy of [n_rows, width, n_embd] with some columns edited, in float32 whatever its own type."""
    states = states.clone()
    states[:, columns] = edit(states[:, columns].float(), strength).to(states.dtype)
    return states


def _hook(
    hooks: ExitStack, module: nn.Module, edit: TensorEdit, edited: Callable[[Tensor, TensorEdit], Tensor]
) -> None:
    def forward_hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edited(output[0], edit), *output[1:])
        return edited(output, edit)

    hooks.callback(module.register_forward_hook(forward_hook).remove)
