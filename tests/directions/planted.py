"""Embeddings in which the direction between the classes is known."""

from __future__ import annotations

import numpy as np


def planted(n_layer, n_pairs, n_embd, *, gap=6.0, swapped=0.0, ignored=0.0, seed=1):
    """Pairs that share what their query adds and differ by `gap` along one direction, plus noise.

    `swapped` and `ignored` are the shares of pairs whose answers changed places, or do not differ.

    Returns:
        The directions [n_layer, n_embd], helpful and harmful embeddings [n_layer, n_pairs, n_embd].
    """
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal((n_layer, n_embd))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    side = np.where(rng.random(n_pairs) < swapped, -1.0, 1.0)
    side[rng.random(n_pairs) < ignored] = 0.0
    shift = gap / 2 * side[:, None] * direction[:, None]
    query = rng.standard_normal((n_layer, n_pairs, n_embd))
    noise = 0.5 * rng.standard_normal((2, n_layer, n_pairs, n_embd))
    return direction, query + shift + noise[0], query - shift + noise[1]


def cosine(vectors, direction):
    """Mean over layers: first vector of [n_layer, k, n_embd] against `direction` [n_layer, n_embd]."""
    return float(np.mean(np.sum(vectors[:, 0] * direction, axis=1)))
