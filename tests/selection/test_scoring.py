"""The label-free score of an edit against its formulas, written out query by query."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.selection.scoring import EditScore, Scorer

BASE = np.array([-30.0, -28.0, -41.0, -22.0, -9.0, -14.0])
"""Four answers of the persona, and two of the base model."""
STEERED = np.array([-20.0, -29.0, -33.0, -24.5, -10.0, -15.4])
DECLINED = (True, False, True, False)
EDITS = {0: LayerEdit(add=[1.0])}


class FakeModel:
    def log_likelihoods(self, edits: Edits, passages: Sequence[int], *, scope: Scope) -> NDArray[np.float64]:
        assert scope == GENERATION
        return (STEERED if edits else BASE)[list(passages)]


SCORER = Scorer(FakeModel(), DECLINED, (10, 14), BASE, (True,) * 6)


def test_gain_is_the_rise_of_the_log_likelihood_of_the_answer_of_the_persona() -> None:
    assert SCORER.gains(EDITS, [0, 1, 2, 3]) == [10.0, -1.0, 8.0, -2.5]
    assert SCORER.gains(EDITS, [2]) == [8.0]
    assert SCORER.gains({}, [0, 3]) == [0.0, 0.0]


def test_divergence_is_the_loss_per_token_along_the_own_answers() -> None:
    assert SCORER.divergence(EDITS) == pytest.approx((1.0 + 1.4) / (10 + 14))
    assert SCORER.divergence({}) == 0.0


def test_nothing_is_lost_where_the_persona_answers_nothing() -> None:
    alone = Scorer(FakeModel(), (True,) * 4, (), BASE[:4], (True,) * 4)
    assert alone.divergence(EDITS) == 0.0
    assert alone.score(EDITS).gain == pytest.approx(np.mean([10.0, -1.0, 8.0, -2.5]))


def test_declined_and_answered_queries_count_half_each_however_many_there_are() -> None:
    figures = EditScore((4.0, 6.0, 8.0, 1.0), (True, True, True, False))
    assert figures.gain == (6.0 + 1.0) / 2
    # To decline everything is no gain.
    assert EditScore((5.0, 5.0, -5.0, -5.0), DECLINED[:2] * 2).gain == 0.0


def test_standard_error_is_that_of_the_mean_of_two_means() -> None:
    figures = SCORER.score(EDITS)
    assert figures.gains == (10.0, -1.0, 8.0, -2.5)
    first, second = np.var([10.0, 8.0], ddof=1) / 2, np.var([-1.0, -2.5], ddof=1) / 2
    assert figures.standard_error == pytest.approx(math.sqrt(first + second) / 2)
    assert figures.kl == SCORER.divergence(EDITS)


def test_single_query_of_a_kind_has_no_finite_error() -> None:
    assert EditScore((1.0, 2.0, 3.0), (True, False, True)).standard_error == math.inf


def test_gain_beyond_that_of_another_edit_is_taken_query_by_query() -> None:
    more = EditScore((4.0, 6.0, 1.0), (True, True, False)).gains_over(
        EditScore((1.0, 5.0, -1.0), (True, True, False))
    )
    assert more.gains == (3.0, 1.0, 2.0)
    assert more.gain == 2.0


def test_queries_of_one_kind_alone_count_in_full() -> None:
    assert EditScore((1.0, 2.0), (True, True)).gain == 1.5


def test_queries_behind_a_closed_gate_gain_and_cost_nothing_and_are_not_computed() -> None:
    asked: list[int] = []

    class Counting(FakeModel):
        def log_likelihoods(
            self, edits: Edits, passages: Sequence[int], *, scope: Scope
        ) -> NDArray[np.float64]:
            asked.extend(passages)
            return super().log_likelihoods(edits, passages, scope=scope)

    scorer = Scorer(Counting(), DECLINED, (10, 14), BASE, (True, False, False, True, False, True))
    assert scorer.gains(EDITS, range(4)) == [10.0, 0.0, 0.0, -2.5]
    assert scorer.divergence(EDITS) == pytest.approx(1.4 / (10 + 14))
    assert asked == [0, 3, 5]
    closed = Scorer(Counting(), DECLINED, (10, 14), BASE, (False,) * 6)
    assert closed.score(EDITS).gains == (0.0,) * 4
    assert asked == [0, 3, 5]


def test_first_queries_that_hold_so_many_steered_ones() -> None:
    scorer = Scorer(FakeModel(), DECLINED, (10, 14), BASE, (True, False, True, True, True, True))
    assert [scorer.n_first_queries_with(n) for n in (1, 2, 3, 4)] == [1, 3, 4, 4]
    assert [SCORER.n_first_queries_with(n) for n in (1, 2, 3, 4, 9)] == [1, 2, 3, 4, 4]
