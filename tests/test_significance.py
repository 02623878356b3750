"""Gains beyond chance: against all draws of signs, against scipy, and how often chance passes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from alignez_gguf.significance import beyond_chance


def gains(seed: int, n_edits: int, n_queries: int, mean: float = 0.0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(mean, 1.0, (n_edits, n_queries))


@pytest.mark.parametrize("seed", range(20))
def test_limit_is_that_of_all_draws_of_signs(seed: int) -> None:
    found = gains(seed, 5, 10)
    found[0] += 1.0
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=10)))
    greatest = stats.ttest_1samp(found[None] * signs[:, None], 0.0, axis=-1).statistic.max(axis=1)
    own = stats.ttest_1samp(found, 0.0, axis=-1).statistic
    # 1000 draws of them: the share of chance that reaches t is known to about .02.
    p = (greatest[None] >= own[:, None]).mean(axis=1)
    passed = beyond_chance(found)
    assert passed[p < 0.03].all()
    assert not passed[p > 0.07].any()


@pytest.mark.parametrize("n_edits", [1, 30, 300])
def test_chance_passes_in_one_of_twenty_searches_however_many_edits_are_tried(n_edits: int) -> None:
    passed = [beyond_chance(gains(seed, n_edits, 16)).any() for seed in range(300)]
    assert 0.02 < np.mean(passed) < 0.09


def test_of_one_edit_the_limit_is_about_that_of_a_t_test() -> None:
    for seed in range(40):
        found = gains(seed, 1, 40, mean=0.25)
        p = float(stats.ttest_1samp(found[0], 0.0, alternative="greater").pvalue)
        if not 0.04 < p < 0.06:
            assert beyond_chance(found)[0] == (p < 0.05)


def test_edits_that_move_the_queries_alike_count_as_one() -> None:
    alone = gains(3, 1, 26, mean=0.45)
    alike = np.concatenate([factor * alone for factor in np.linspace(0.1, 2, 400)])
    apart = np.concatenate([alone, gains(4, 400, 26)])
    assert beyond_chance(alone).all()
    assert beyond_chance(alike).all()
    assert not beyond_chance(apart).any()


def test_the_unit_of_the_gains_does_not_matter() -> None:
    found = gains(0, 50, 20, mean=0.6)
    passed = beyond_chance(found)
    assert 0 < passed.sum() < 50
    np.testing.assert_array_equal(beyond_chance(found * np.geomspace(1e-6, 1e6, 50)[:, None]), passed)


def test_nothing_passes_that_does_nothing_or_was_seen_on_too_few_queries() -> None:
    assert not beyond_chance(np.zeros((3, 20))).any()
    assert not beyond_chance(np.full((3, 1), 5.0)).any()
    assert not beyond_chance(np.full((3, 4), 5.0)).any()


def test_the_same_gain_on_every_query_passes() -> None:
    np.testing.assert_array_equal(
        beyond_chance(np.stack([np.full(12, 0.1), np.zeros(12), np.full(12, -0.1)])), [True, False, False]
    )
