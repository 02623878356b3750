"""Edits of torch tensors, for the hooks of both ways to steer a transformers model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignez_gguf.edits import LayerEdit

TensorEdit = Callable[[Tensor, float], Tensor]
"""Edits hidden states [..., n_embd] with a strength, in their own type and on their own device."""


def mlp_edit(edit: LayerEdit) -> TensorEdit:
    """x + s (V^T G V x + b), for an MLP output; see `edits.apply_to_mlp`."""
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
    """h + s a, for a block output."""
    assert edit.add is not None
    vector = torch.tensor(edit.add)
    return lambda h, strength: h + strength * vector.to(h.device)
