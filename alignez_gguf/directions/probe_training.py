"""Trains many CCS probes at once, each as if it were alone: the loss, its gradient and AdamW.

An epoch of a layer is two products with its embeddings X [2 n_pairs, n_embd], theta X^T for the logits and
r X for the gradient, and little else. AdamW is elementwise, so that no rotation of X makes them smaller; but
X stays the same over all epochs, so it is packed once, where torch would rearrange it in every product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPOCHS = 1000
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01

Product = Callable[[Tensor], Tensor]


def train(
    x: Tensor, initial: Tensor, share: Tensor, *, squared_min: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Train all probes of all layers.

    Args:
        x: float32 [n_layer, 2, n_pairs, n_embd], normalised: helpful, harmful.
        initial: float32 [n_layer, n_probes, n_embd], the first theta; the first b is 0.
        share: float32 [n_probes, n_pairs], the share of each pair in the loss of a probe; a row sums to 1.
        squared_min: whether the minimum in the loss is squared.

    Returns:
        theta [n_layer, n_probes, n_embd], P [n_layer, n_probes, 2, n_pairs] and the loss [n_layer, n_probes].
    """
    n_layer, _, n_pairs, _ = x.shape
    n_probes = initial.shape[1]
    times_rows, times_columns = _products(x.flatten(1, 2), n_probes)
    theta, bias = initial.clone(), torch.zeros(n_layer, n_probes, 1)
    optimizer = _AdamW(theta, bias)

    def probabilities() -> Tensor:
        return times_rows(theta).add_(bias).sigmoid_().view(n_layer, n_probes, 2, n_pairs)

    for _ in range(EPOCHS):
        slopes = _logit_slopes(probabilities(), squared_min).mul_(share[:, None]).flatten(2)
        optimizer.step(times_columns(slopes), slopes.sum(dim=2, keepdim=True))
    p = probabilities()
    loss = (_loss(p, squared_min) * share).sum(dim=-1)
    return theta.numpy(), p.numpy(), loss.numpy()


def _loss(p: Tensor, squared_min: bool) -> Tensor:
    """Return the loss of every pair from P [..., 2, n_pairs]."""
    helpful, harmful = p.unbind(-2)
    lower = torch.minimum(helpful, harmful)
    return (helpful + harmful - 1).square() + (lower.square() if squared_min else lower)


def _logit_slopes(p: Tensor, squared_min: bool) -> Tensor:
    """Return the derivative of `_loss` by the logits, [..., 2, n_pairs], as autograd has it.

    Where both probabilities are equal, each has half of the slope of the minimum.
    """
    helpful, harmful = p.unbind(-2)
    by_consistency = (helpful + harmful).sub_(1).mul_(2)
    helpful_is_lower = (harmful - helpful).sign_().add_(1).mul_(0.5)
    by_minimum = torch.stack((helpful_is_lower, 1 - helpful_is_lower), dim=-2)
    if squared_min:
        by_minimum.mul_(2 * torch.minimum(helpful, harmful).unsqueeze(-2))
    return by_minimum.add_(by_consistency.unsqueeze(-2)).mul_(p).mul_(1 - p)


def _products(rows: Tensor, n_probes: int) -> tuple[Product, Product]:
    """Return the products a -> a X^T and a -> a X.

    X is `rows` [n_layer, n_rows, n_embd], and a is [n_layer, n_probes, ...].
    """
    if len(rows) == 1 and _can_pack():
        return _packed(rows[0], n_probes), _packed(rows[0].T, n_probes)
    return lambda a: a @ rows.mT, lambda a: a @ rows


def _packed(matrix: Tensor, n_rows: int) -> Product:
    """Return the product a -> a M^T for a [1, n_rows, n].

    M is `matrix` [m, n], packed in the order in which oneDNN reads it.

    These are the operators that torch.compile puts in place of a Linear layer with constant weights; with 16
    rows they take half the time of `matmul`.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), n_rows)
    return lambda a: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")


@cache
def _can_pack() -> bool:
    """Whether this torch has oneDNN and the operators, which it does not promise to keep."""
    matrix, a = torch.arange(6.0).view(2, 3), torch.arange(3.0).view(1, 1, 3)
    try:
        return torch.equal(_packed(matrix, 1)(a), a @ matrix.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


class _AdamW:
    """`torch.optim.AdamW(fused=True)`, without what importing that costs: as long as fitting a small model.

    Loshchilov and Hutter, arXiv 1711.05101, with the usual beta 0.9 and 0.999 and epsilon 1e-8.
    """

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = list(parameters)
        self.means = [torch.zeros_like(parameter) for parameter in parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = [torch.zeros(()) for _ in parameters]

    def step(self, *gradients: Tensor) -> None:
        for count in self.steps:
            count.add_(1)
        torch._fused_adamw_(
            self.parameters,
            list(gradients),
            self.means,
            self.squares,
            [],
            self.steps,
            lr=LEARNING_RATE,
            beta1=0.9,
            beta2=0.999,
            weight_decay=WEIGHT_DECAY,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
