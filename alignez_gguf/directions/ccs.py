"""Contrast-consistent search, as AlignEZ uses it: a linear probe per layer, trained without labels.

A probe P(x) = sigmoid(theta . x + b) minimises, over the pairs of a layer,

    E[(P(helpful) - (1 - P(harmful)))^2 + min(P(helpful), P(harmful))]

so that it gives the two answers of a pair opposite classes, and does so with confidence; which of them is
class 1 is left to chance. Burns et al. (arXiv 2212.03827) square the minimum; AlignEZ does not.

Burns et al. also centre each class by its own mean. There the classes are "yes" and "no"; here they are
helpful and harmful, and centring them apart would remove the very direction that is looked for. So the
embeddings of a layer are shifted by one mean and scaled by one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignez_gguf.directions import Directions
from alignez_gguf.directions.embeddings import (
    FOLDS,
    EmbeddingsPerLayer,
    accuracy_of,
    check_shapes,
    fold_of_pair,
    layer_embeddings,
    towards_helpful,
)

EPOCHS = 1000
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
RESTARTS = 10
FOLD_RESTARTS = 2
"""For held-out accuracy: 10 + 3 x 2 probes fill the 16 columns that a matrix product computes anyway."""

_INITIAL_LOGIT = 0.01
"""Standard deviation of the logits of a fresh probe, so that no restart is born with an opinion."""

_CHUNK_BYTES = 4 << 20
"""Layers are trained together up to this size: small ones share the cost of a step, large ones the cache."""


@dataclass(frozen=True)
class _Layer:
    """What is kept of one layer."""

    vector: NDArray[np.float32]
    p_helpful: float
    p_harmful: float
    accuracy: float
    loss: float


def fit(
    helpful: EmbeddingsPerLayer, harmful: EmbeddingsPerLayer, *, rank: int = 1, seed: int = 0
) -> Directions:
    """The probe of lowest loss among 10 restarts, for every layer; see `alignez_gguf.directions.fit`.

    Chunks of layers run in parallel threads, each with one torch thread, so that the result does not
    depend on how many there are; torch's number of threads is set to 1 for the time of the fit.
    """
    if rank != 1:
        raise ValueError(f"a CCS probe is one direction, not {rank}")
    n_layer, n_pairs, n_embd = check_shapes(helpful, harmful, rank)
    fold = fold_of_pair(n_pairs, seed)
    size = max(1, _CHUNK_BYTES // (2 * n_pairs * n_embd * 4))
    chunks = [range(start, min(start + size, n_layer)) for start in range(0, n_layer, size)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            fits = pool.map(lambda chunk: _fit_chunk(helpful, harmful, chunk, fold, seed), chunks)
            layers = [layer for chunk in fits for layer in chunk]
    finally:
        torch.set_num_threads(threads)
    return Directions(
        "ccs",
        vectors=np.stack([layer.vector for layer in layers])[:, None],
        p_helpful=np.array([layer.p_helpful for layer in layers], np.float32),
        p_harmful=np.array([layer.p_harmful for layer in layers], np.float32),
        accuracy=np.array([layer.accuracy for layer in layers], np.float32),
        loss=np.array([layer.loss for layer in layers], np.float32),
    )


def _fit_chunk(
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    layers: Sequence[int],
    fold: NDArray[np.int64],
    seed: int,
) -> list[_Layer]:
    x = np.stack([layer_embeddings(helpful, harmful, layer) for layer in layers])
    gaps = x[:, 0].mean(axis=1) - x[:, 1].mean(axis=1)
    _normalise(x)
    n_probes = RESTARTS + FOLDS * FOLD_RESTARTS
    fold_of_probe = np.array([-1] * RESTARTS + sorted([*range(FOLDS)] * FOLD_RESTARTS))
    initial = np.stack(
        [np.random.default_rng([seed, layer]).standard_normal((n_probes, x.shape[-1])) for layer in layers]
    )
    initial *= _INITIAL_LOGIT / np.sqrt(x.shape[-1])
    trained_on = fold_of_probe[:, None] != fold
    theta, p, loss = train(
        torch.from_numpy(x), torch.from_numpy(initial.astype(np.float32)), torch.from_numpy(trained_on)
    )
    return [_best(theta[i], p[i], loss[i], gaps[i], fold, fold_of_probe) for i in range(len(layers))]


def _normalise(x: NDArray[np.float32]) -> None:
    """Shift a layer of `x` [n_layer, 2, n_pairs, n_embd] by its pooled mean, scale it to variance 1."""
    x -= x.mean(axis=(1, 2), keepdims=True)
    scale = np.sqrt(np.square(x).mean(axis=(1, 2, 3), keepdims=True))
    x /= np.where(scale > 0, scale, 1)


def train(
    x: Tensor, initial: Tensor, trained_on: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Train all probes of all layers at once; each one as if it were alone.

    Args:
        x: float32 [n_layer, 2, n_pairs, n_embd], normalised: helpful, harmful.
        initial: float32 [n_layer, n_probes, n_embd], the first theta; the first b is 0.
        trained_on: bool [n_probes, n_pairs], the pairs that count in the loss of a probe.

    Returns:
        theta [n_layer, n_probes, n_embd], P [n_layer, n_probes, 2, n_pairs] and the loss [n_layer, n_probes].
    """
    n_layer, _, n_pairs, n_embd = x.shape
    rows = x.reshape(n_layer, 2 * n_pairs, n_embd).mT
    weight = trained_on / trained_on.sum(dim=1, keepdim=True)
    theta = initial.clone().requires_grad_()
    bias = torch.zeros(*initial.shape[:2], 1, requires_grad=True)
    optimizers = _AdamW(theta), _AdamW(bias)

    def forward() -> tuple[Tensor, Tensor]:
        p = torch.baddbmm(bias, theta, rows).sigmoid().reshape(n_layer, -1, 2, n_pairs)
        p_helpful, p_harmful = p.unbind(-2)
        per_pair = (p_helpful + p_harmful - 1).square() + torch.minimum(p_helpful, p_harmful)
        return p, (per_pair * weight).sum(-1)

    for _ in range(EPOCHS):
        gradients = torch.autograd.grad(forward()[1].sum(), (theta, bias))
        for optimizer, gradient in zip(optimizers, gradients, strict=True):
            optimizer.step(gradient)
    with torch.no_grad():
        p, loss = forward()
    return theta.detach().numpy(), p.numpy(), loss.numpy()


class _AdamW:
    """`torch.optim.AdamW` for one tensor; importing that one costs as long as fitting a small model.

    Loshchilov and Hutter, arXiv 1711.05101, with the usual beta 0.9 and 0.999 and epsilon 1e-8.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter.detach()
        self.mean = torch.zeros_like(self.parameter)
        self.square = torch.zeros_like(self.parameter)
        self.steps = 0

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        scale = self.square.sqrt().div_(math.sqrt(1 - 0.999**self.steps)).add_(1e-8)
        self.parameter.mul_(1 - LEARNING_RATE * WEIGHT_DECAY)
        self.parameter.addcdiv_(self.mean, scale, value=-LEARNING_RATE / (1 - 0.9**self.steps))


def _best(
    theta: NDArray[np.float32],
    p: NDArray[np.float32],
    loss: NDArray[np.float32],
    gap: NDArray[np.float32],
    fold: NDArray[np.int64],
    fold_of_probe: NDArray[np.int64],
) -> _Layer:
    """Keep the probe of lowest loss, and measure the best one of each fold on the pairs it did not see."""
    held_out = np.empty((2, len(fold)), np.float32)
    for part in range(FOLDS):
        probes = np.flatnonzero(fold_of_probe == part)
        p_part = p[probes[loss[probes].argmin()]]
        seen, unseen = fold != part, fold == part
        flipped = p_part[0, seen].mean() < p_part[1, seen].mean()
        held_out[:, unseen] = 1 - p_part[:, unseen] if flipped else p_part[:, unseen]
    best = int(loss[:RESTARTS].argmin())
    p_helpful, p_harmful = p[best].mean(axis=1)
    vector = towards_helpful(theta[best] / np.linalg.norm(theta[best]), gap)
    return _Layer(vector, float(p_helpful), float(p_harmful), accuracy_of(*held_out), float(loss[best]))
