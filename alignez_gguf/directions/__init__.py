"""Directions that separate helpful from harmful embeddings, one method per file.

Methods take and return arrays; they hold no I/O and know nothing of models. Importing this package does
not import torch: a method is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from inspect import Parameter, signature
from typing import Any, Protocol, cast

from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.embeddings import EmbeddingsPerLayer, Weights

METHODS = ("ccs", "svd", "svd-diff", "mean", "logistic")
"""The names that `fit` knows; `svd-diff` is in svd_diff.py, and so on."""


class Method(Protocol):
    """The interface of each method's module; options of its own follow as keywords with a default."""

    def fit(
        self,
        helpful: EmbeddingsPerLayer,
        harmful: EmbeddingsPerLayer,
        *,
        rank: int,
        seed: int,
        weights: Weights,
        **options: Any,
    ) -> Directions: ...


def fit(
    method: str,
    helpful: EmbeddingsPerLayer,
    harmful: EmbeddingsPerLayer,
    *,
    rank: int = 1,
    seed: int = 0,
    weights: Weights = None,
    **options: Any,
) -> Directions:
    """Find the directions of every layer.

    Args:
        method: a name in `METHODS`.
        helpful, harmful: [n_layer, n_pairs, n_embd]; row i of both belongs to pair i.
        rank: directions per layer; methods other than `svd` and `svd-diff` have one.
        seed: decides initial values and which pairs are held out.
        weights: [n_pairs], positive: how much each pair counts, relative to the others; `None` for all alike.
        **options: options of the method; its own `fit` describes them.

    Raises:
        ValueError: an unknown method or option, shapes that differ, a value that is not finite, a weight that
            is not positive, a rank that the method does not have.
        QueryError: too few pairs.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    module = cast(Method, import_module(f"{__name__}.{method.replace('-', '_')}"))
    known = _options(module)
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{method} has no option {name!r}; {has}")
    return module.fit(helpful, harmful, rank=rank, seed=seed, weights=weights, **options)


def _options(module: Method) -> list[str]:
    keywords = [
        name
        for name, parameter in signature(module.fit).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY
    ]
    return [name for name in keywords if name not in ("rank", "seed", "weights")]
