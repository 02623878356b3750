"""A gate against numpy and scipy, and what it refuses to be."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.special import log_softmax

from alignez_gguf.control.gate import Gate
from alignez_gguf.errors import SteeringError

RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=40).astype(np.float32)
TOKENS = np.array([7, 3, 39], np.int32)
WEIGHTS = np.array([0.5, -2.0, 1.0], np.float32)


def test_score_is_the_weighted_sum_of_log_probabilities() -> None:
    expected = float(WEIGHTS @ log_softmax(LOGITS.astype(np.float64))[TOKENS])
    assert Gate(TOKENS, WEIGHTS, 0.0).score(LOGITS) == pytest.approx(expected, abs=1e-12)


def test_log_probabilities_and_shifted_logits_score_alike() -> None:
    gate = Gate(TOKENS, WEIGHTS, 0.0)
    for same in (log_softmax(LOGITS.astype(np.float64)), LOGITS.astype(np.float64) + 300):
        assert gate.score(same) == pytest.approx(gate.score(LOGITS), abs=1e-9)


def test_gate_opens_above_its_threshold_and_not_on_it() -> None:
    score = Gate(TOKENS, WEIGHTS, 0.0).score(LOGITS)
    assert not Gate(TOKENS, WEIGHTS, score).opens(LOGITS)
    assert Gate(TOKENS, WEIGHTS, math.nextafter(score, -math.inf)).opens(LOGITS)


def test_gate_keeps_copies_that_nobody_can_change() -> None:
    weights = WEIGHTS.copy()
    gate = Gate(TOKENS, weights, 0.0)
    weights[0] = 9
    assert gate.weights[0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        gate.weights[0] = 9


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("weights", [0.5, 1.0], "as many weights as tokens"),
        ("weights", [0.5, 1.0, math.nan], "finite"),
        ("threshold", math.inf, "finite"),
        ("tokens", [7, 7, 3], "different ids"),
        ("tokens", [7, -1, 3], "different ids"),
    ],
)
def test_malformed_gate_is_refused(field: str, value: object, reason: str) -> None:
    with pytest.raises(SteeringError, match=reason):
        dataclasses.replace(Gate(TOKENS, WEIGHTS, 0.0), **{field: value})  # type: ignore[arg-type]


def test_gate_without_tokens_is_refused() -> None:
    with pytest.raises(SteeringError, match="as many weights as tokens"):
        Gate(np.zeros(0, np.int32), np.zeros(0, np.float32), 0.0)


def test_gate_of_a_larger_vocabulary_is_an_error_and_not_an_open_door() -> None:
    with pytest.raises(SteeringError, match="token 39, but the model has 39"):
        Gate(TOKENS, WEIGHTS, 0.0).opens(LOGITS[:39])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_logits_that_cannot_be_read_are_an_error(value: float) -> None:
    logits = LOGITS.copy()
    logits[7] = value
    with pytest.raises(SteeringError, match="cannot be read"):
        Gate(TOKENS, WEIGHTS, 0.0).opens(logits)


def test_digest_tells_gates_apart() -> None:
    gate = Gate(TOKENS, WEIGHTS, 0.25)
    others = [
        dataclasses.replace(gate, threshold=0.5),
        dataclasses.replace(gate, weights=2 * WEIGHTS),
        dataclasses.replace(gate, tokens=TOKENS + np.int32(1) * (TOKENS != 39)),
    ]
    assert dataclasses.replace(gate).digest == gate.digest
    assert len({gate.digest, *(other.digest for other in others)}) == 4
