from __future__ import annotations

import numpy as np
import pytest

from alignez_gguf.evaluation.metrics import Bootstrap, Estimate, Outcome, Tally, outcome_values, perplexity
from alignez_gguf.text.repetition import repetition

OUTCOMES: list[Outcome] = ["win"] * 5 + ["lose"] * 2 + ["tie"] * 2 + ["disagreement"] + ["unparsed"] * 3


def test_percentages_are_taken_over_the_comparisons_with_a_verdict() -> None:
    tally = Tally.of(OUTCOMES)
    assert (tally.judged, tally.unparsed, tally.disagreement) == (10, 3, 1)
    assert (tally.win_percent, tally.lose_percent, tally.net_win_percent) == (50.0, 20.0, 30.0)


def test_nothing_judged_has_no_percentage() -> None:
    assert Tally.of(["unparsed"]).net_win_percent is None


def test_net_win_of_the_bootstrap_is_that_of_the_tally() -> None:
    found = Bootstrap(len(OUTCOMES)).mean(outcome_values(OUTCOMES), scale=100)
    assert found.value == pytest.approx(30.0)
    assert found.n == 10


def test_interval_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = Bootstrap(400, seed=0).mean(values)
    error = values.std(ddof=1) / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        found = Bootstrap(80, seed=trial, n_resamples=400).mean((rng.random(80) < 0.3).astype(float))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_paired_difference_is_narrower_than_unpaired_ones_where_queries_differ_more_than_systems() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, size=100)
    ours, base = hard + 1 + rng.normal(0, 0.1, 100), hard
    bootstrap = Bootstrap(100)
    paired, alone = bootstrap.difference(ours, base), bootstrap.mean(ours)
    assert paired.value == pytest.approx((ours - base).mean())
    assert paired.clear_of_zero
    assert alone.high is not None
    assert paired.high is not None
    assert alone.low is not None
    assert paired.low is not None
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_queries_without_a_value_are_left_out_and_not_counted() -> None:
    found = Bootstrap(4).mean(np.array([1.0, np.nan, 1.0, np.nan]))
    assert found == Estimate(1.0, 1.0, 1.0, 2)
    assert Bootstrap(2).mean(np.array([np.nan, np.nan])).n == 0


def test_one_query_has_no_interval() -> None:
    found = Bootstrap(3).mean(np.array([np.nan, 1.0, np.nan]))
    assert (found.value, found.low, found.n) == (1.0, None, 1)
    assert not found.clear_of_zero


def test_seed_decides_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert Bootstrap(50, seed=3).mean(values) == Bootstrap(50, seed=3).mean(values)
    assert Bootstrap(50, seed=3).mean(values) != Bootstrap(50, seed=4).mean(values)


def test_relative_improvement_is_the_quotient_of_net_wins_with_an_interval_around_it() -> None:
    ours = outcome_values(["win"] * 30 + ["tie"] * 70)
    aligned = outcome_values(["win"] * 60 + ["tie"] * 40)
    found = Bootstrap(100).relative_improvement(ours, aligned)
    assert found.value == pytest.approx(50.0)
    assert found.low is not None
    assert found.high is not None
    assert 30 < found.low < 50 < found.high < 70


def test_relative_improvement_is_undefined_without_a_net_win_of_the_aligned_model() -> None:
    ours = outcome_values(["win"] * 4)
    for aligned in (["lose", "tie", "tie", "tie"], ["win", "lose", "tie", "tie"]):
        found = Bootstrap(4).relative_improvement(ours, outcome_values(aligned))  # type: ignore[arg-type]
        assert found.value is None
        assert "not positive" in found.note


def test_relative_improvement_has_no_interval_where_the_aligned_net_win_is_not_clear_of_zero() -> None:
    ours = outcome_values(["win"] * 10)
    aligned = outcome_values(["win"] * 4 + ["lose"] * 3 + ["tie"] * 3)
    found = Bootstrap(10).relative_improvement(ours, aligned)
    assert found.value == pytest.approx(1000.0)
    assert found.low is None
    assert "not clear of zero" in found.note


def test_repetition_counts_three_word_sequences_that_came_before() -> None:
    assert repetition("one two three four five") == 0
    assert repetition("a b c a b c a b c") == pytest.approx(4 / 7)
    assert repetition("") == repetition("one two") == 0


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert perplexity(Estimate(0.0, 0.0, np.log(2), 3)) == Estimate(1.0, 1.0, pytest.approx(2.0), 3)
    assert perplexity(Estimate(None, None, None, 0)).value is None
