"""Measures how far rounding alone moves what a model computes on this machine, as a floor for edits.

A number at the edge of an 8-bit step falls to the other one when its last bit changes, and every product with
quantized weights behind it passes that on: an edit a thousand times too small to matter moves logits as much
as one that matters. Where a batch that is split differently rounds differently, that shows how much. Where it
does not, a probe does: a random direction, edited at two small strengths s and s / 2. What is linear in the
strength cancels in x(s) - 2 x(s / 2) + x(0), and rounding is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import SteeringError

if TYPE_CHECKING:
    from alignez_gguf.runtime.layer_reader import Observation
    from alignez_gguf.verification.session import VerificationSession, Way

_STRENGTH = 1 / 32
"""Strength of the probe: a random direction holds little of an MLP output, so this is thousandths of it."""
_PROBED_LAYERS = 4
"""The probe acts at the first of these that takes an edit."""
_LARGEST_SHARE = 1e3


@dataclass(frozen=True)
class EffectShare:
    """A length of each token as a share of another one.

    Attributes:
        median: the median over the tokens.
        worst: the largest share; at most 1000, where there is nothing to be a share of.
    """

    median: float
    worst: float

    @classmethod
    def of(cls, part: NDArray[Any], whole: NDArray[Any]) -> EffectShare:
        """Return the share of the lengths `part` [n_tokens] in `whole` [n_tokens]."""
        largest = _LARGEST_SHARE * (part > 0)
        shares = np.minimum(
            np.divide(part, whole, out=largest, where=whole > part / _LARGEST_SHARE), _LARGEST_SHARE
        )
        return cls(float(np.median(shares)), float(shares.max()))


def median_and_worst(share: EffectShare | None) -> tuple[float | None, float | None]:
    """Return the median and the worst of a share, or None twice without one."""
    return (None, None) if share is None else (share.median, share.worst)


@dataclass(frozen=True, eq=False)
class RoundingFloor:
    """The changes by rounding alone, as the difference of two runs.

    Attributes:
        logits: root mean square change over the vocabulary, [n_tokens].
        mlp, block: change of the hidden states by layer, [n_tokens, n_embd]; a layer that could not be
            measured is missing, and one before the probe hardly changes.
    """

    logits: NDArray[np.float64]
    mlp: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    block: dict[int, NDArray[np.float64]] = field(default_factory=dict)


def rounding_floor(
    session: VerificationSession, way: Way, base_logits: NDArray[np.float32], base: Observation
) -> RoundingFloor:
    """Measure the floor of the unsteered model: by decoding single tokens, and by the probe.

    Args:
        session: runs the model.
        way: how the probe reaches llama.cpp.
        base_logits: float32 [n_tokens, n_vocab], the logits without an edit.
        base: the MLP and block outputs without an edit.
    """
    split = logits_distance(session.logits(at_once=1), base_logits)
    for layer, edit in _probes(session.info.n_layer, session.info.n_embd, base):
        try:
            with session.steered(way, {layer: edit}) as backend:
                session.set_strength(backend, _STRENGTH)
                whole_logits, whole = session.observe()
                session.set_strength(backend, _STRENGTH / 2)
                half_logits, half = session.observe()
        except SteeringError:
            continue
        if np.array_equal(whole_logits, base_logits):
            continue
        return RoundingFloor(
            np.maximum(split, root_mean_square(_rest(whole_logits, half_logits, base_logits))),
            _rests(whole.mlp, half.mlp, base.mlp),
            _rests(whole.block, half.block, base.block),
        )
    return RoundingFloor(split)


def root_mean_square(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Return the root mean square of each row."""
    result: NDArray[np.float64] = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=-1))
    return result


def logits_distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the root mean square difference over the vocabulary, [n_tokens]."""
    return root_mean_square(a.astype(np.float64) - b)


def _probes(n_layer: int, n_embd: int, base: Observation) -> Iterator[tuple[int, LayerEdit]]:
    """Yield a random direction at the first layers: removed, and added at its length in the stream."""
    direction = np.random.default_rng(0).standard_normal(n_embd, np.float32)
    direction /= np.linalg.norm(direction)
    for layer in range(min(n_layer, _PROBED_LAYERS)):
        yield layer, LayerEdit(remove=direction)
        stream = base.block.get(layer)
        size = 1.0 if stream is None else float(np.median(np.linalg.norm(stream, axis=-1))) / n_embd**0.5
        yield layer, LayerEdit(add=np.float32(size) * direction)


def _rest(whole: NDArray[Any], half: NDArray[Any], none: NDArray[Any]) -> NDArray[np.float64]:
    """Return x(s) - 2 x(s / 2) + x(0), whose variance is three times that of the difference of two runs."""
    rest: NDArray[np.float64] = (whole.astype(np.float64) - 2.0 * half + none) / 3**0.5
    return rest


def _rests(
    whole: dict[int, NDArray[np.float32]],
    half: dict[int, NDArray[np.float32]],
    none: dict[int, NDArray[np.float32]],
) -> dict[int, NDArray[np.float64]]:
    return {
        layer: _rest(whole[layer], half[layer], none[layer])
        for layer in whole.keys() & half.keys() & none.keys()
    }
