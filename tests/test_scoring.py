"""The label-free score of an edit against its formulas, written out query by query."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.edits import Edits, LayerEdit
from alignez_gguf.scope import GENERATION, Scope
from alignez_gguf.scoring import (
    NO_LIMITS,
    Divergence,
    Figures,
    Limits,
    Scorer,
    Steering,
    divergence_along,
    gains,
    leaks,
)

N_QUERIES, N_VOCAB = 12, 7


def distributions(seed: int) -> NDArray[np.float32]:
    # close enough together that every token is plausible to somebody
    logits = np.random.default_rng(seed).normal(scale=0.5, size=(N_QUERIES, N_VOCAB))
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


HELPFUL, HARMFUL, STEERED = distributions(0), distributions(1), distributions(3)
BASE = np.log(distributions(2))


def kl(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    return sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def expected_gains() -> list[float]:
    return [
        (kl(helpful, np.exp(base)) - kl(helpful, changed))
        - (kl(harmful, np.exp(base)) - kl(harmful, changed))
        for helpful, harmful, base, changed in zip(HELPFUL, HARMFUL, BASE, STEERED, strict=True)
    ]


class FakeModel:
    """Shows `STEERED`, the more of it the greater the strength."""

    def first_token_logprobs(self, steerings: Sequence[Steering], *, scope: Scope) -> NDArray[np.float32]:
        return np.stack([BASE + one.strength * (np.log(STEERED) - BASE) for one in steerings])

    def divergence(self, edits: Edits, limits: Limits = NO_LIMITS, *, scope: Scope) -> Divergence:
        return Divergence(along_helpful=(0.3,), along_base=(0.05,), n_answers=1)


EDITS = {0: LayerEdit(add=np.ones(4))}


def test_gain_is_the_drop_of_one_divergence_minus_the_drop_of_the_other() -> None:
    np.testing.assert_allclose(gains(HELPFUL, HARMFUL, BASE, np.log(STEERED)), expected_gains(), atol=1e-5)


def test_no_edit_gains_and_leaks_nothing() -> None:
    np.testing.assert_array_equal(gains(HELPFUL, HARMFUL, BASE, BASE), np.zeros(N_QUERIES))
    np.testing.assert_array_equal(leaks(HELPFUL, HARMFUL, BASE, BASE), np.zeros(N_QUERIES))


def test_leak_is_the_probability_that_moves_to_tokens_nobody_would_say() -> None:
    helpful = np.array([[0.6, 0.1, 0.2, 0.09, 0.01]], np.float32)
    harmful = np.array([[0.1, 0.6, 0.29, 0.009, 0.001]], np.float32)
    base = np.array([[0.3, 0.4, 0.29, 0.005, 0.005]], np.float32)
    to_helpful = np.array([[0.55, 0.1, 0.25, 0.095, 0.005]], np.float32)
    astray = np.array([[0.3, 0.1, 0.1, 0.2, 0.3]], np.float32)
    # only the last token is below 5% of the likeliest for all three
    assert leaks(helpful, harmful, np.log(base), np.log(to_helpful)) == pytest.approx([0.0])
    assert leaks(helpful, harmful, np.log(base), np.log(astray)) == pytest.approx([0.3 - 0.005])


def test_figures_are_the_mean_gain_its_error_and_the_onset_query_by_query() -> None:
    figures = Scorer(FakeModel(), GENERATION, HELPFUL, HARMFUL, BASE).figures(np.log(STEERED))
    each = expected_gains()
    assert figures.gain == pytest.approx(sum(each) / N_QUERIES, abs=1e-5)
    variance = sum((gain - figures.gain) ** 2 for gain in each) / (N_QUERIES - 1)
    assert figures.standard_error == pytest.approx(math.sqrt(variance / N_QUERIES), rel=1e-4)
    onset = sum(math.log(2 / (1 + math.exp(-gain))) for gain in each) / N_QUERIES
    assert figures.onset == pytest.approx(onset, abs=1e-5)
    assert figures.onset < math.log(2 / (1 + math.exp(-figures.gain)))  # Jensen
    assert figures.leak == pytest.approx(leaks(HELPFUL, HARMFUL, BASE, np.log(STEERED)).mean())
    assert figures.divergence is None


def test_single_query_has_no_finite_error() -> None:
    one = slice(1)
    figures = Scorer(FakeModel(), GENERATION, HELPFUL[one], HARMFUL[one], BASE[one]).figures(
        np.log(STEERED[one])
    )
    assert figures.standard_error == math.inf


def test_every_steering_has_figures_of_its_own() -> None:
    scorer = Scorer(FakeModel(), GENERATION, HELPFUL, HARMFUL, BASE)
    none, half, whole = scorer.first_tokens([Steering(EDITS, strength) for strength in (0.0, 0.5, 1.0)])
    assert none.gain == 0
    assert half.gain == pytest.approx(whole.gain / 2, rel=1e-4)
    assert whole == scorer.figures(np.log(STEERED))
    assert scorer.n_queries == N_QUERIES


def test_score_is_the_first_tokens_with_the_divergence() -> None:
    scorer = Scorer(FakeModel(), GENERATION, HELPFUL, HARMFUL, BASE)
    score = scorer.score(EDITS)
    assert score.kl == 0.05
    assert score.net == score.bound - 0.3
    assert replace(score, divergence=None) == scorer.first_tokens([Steering(EDITS)])[0]


ALONG_HELPFUL, ALONG_BASE = (0.5, 0.25, 1.0), (0.01, 0.03, 0.02)


@pytest.mark.parametrize(
    ("limits", "n_helpful", "n_base"),
    [
        (Limits(), 3, 3),
        (Limits(per_token=0.07, after_first=1.8), 3, 3),
        (Limits(after_first=0.4), 1, 0),
        (Limits(after_first=0.5), 2, 1),
        (Limits(after_first=1.0), 3, 1),
        (Limits(per_token=0.005), 1, 1),
        (Limits(per_token=0.03), 1, 2),
        (Limits(per_token=0.03, after_first=0.6), 2, 1),
        (Limits(per_token=0.03, after_first=0.4), 1, 0),
    ],
)
def test_divergence_is_measured_until_it_exceeds_a_limit_along_what_will_sooner(
    limits: Limits, n_helpful: int, n_base: int
) -> None:
    asked: list[float] = []

    def told(answers: Sequence[float]) -> Iterator[float]:
        for answer in answers:
            asked.append(answer)
            yield answer

    found = divergence_along(told(ALONG_HELPFUL), told(ALONG_BASE), 3, limits)
    assert found == Divergence(ALONG_HELPFUL[:n_helpful], ALONG_BASE[:n_base], 3)
    assert len(asked) == n_helpful + n_base
    assert found.is_whole == (n_helpful == n_base == 3)
    assert found.exceeds(limits) == (not found.is_whole)
    assert (found.after_first, found.per_token) == pytest.approx(
        (sum(ALONG_HELPFUL[:n_helpful]), sum(ALONG_BASE[:n_base]))
    )


@pytest.mark.parametrize("per_token", [0.005, 0.03, math.inf])
@pytest.mark.parametrize("after_first", [0.4, 0.6, math.inf])
def test_part_of_a_divergence_is_what_would_have_been_measured(per_token: float, after_first: float) -> None:
    limits = Limits(per_token, after_first)
    measured = divergence_along(ALONG_HELPFUL, ALONG_BASE, 3, limits)
    whole = divergence_along(ALONG_HELPFUL, ALONG_BASE, 3, NO_LIMITS)
    assert whole.within(limits) == measured
    for more in (Limits(0.03), Limits(after_first=0.6)):
        longer = divergence_along(ALONG_HELPFUL, ALONG_BASE, 3, more).within(limits)
        assert longer == measured if longer.suffices_for(limits) else not longer.is_whole


def test_edit_that_was_not_measured_to_the_end_has_no_net() -> None:
    figures = Scorer(FakeModel(), GENERATION, HELPFUL, HARMFUL, BASE).score(EDITS)
    for helpful, base in [((), ()), ((0.3,), ())]:
        unfinished = replace(figures, divergence=Divergence(helpful, base, 1))
        assert (unfinished.kl, unfinished.net) == (None, None)


def test_net_pays_for_the_leak_and_for_the_rest_of_the_answer() -> None:
    figures = Figures((1.0, 0.5), leak=0.2)
    assert (figures.kl, figures.net) == (None, None)
    assert figures.bound == pytest.approx(figures.onset + math.log(0.8))
    paid = replace(figures, divergence=Divergence((0.1, 0.2), (0.04, 0.01), 2))
    assert paid.net == pytest.approx(figures.bound - 0.3)
    assert replace(figures, leak=1.0).bound == -math.inf
