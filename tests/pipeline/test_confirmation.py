"""What is confirmed, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.engines.base import Completion
from alignez_gguf.errors import NoGainError
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Job
from alignez_gguf.pipeline.confirmation import AnswerCounts, Confirmation, confirm
from alignez_gguf.selection.scoring import EditScore
from tests.pipeline.conftest import with_engine

NO, YES = "I'm sorry, but I can't help with that.", "Happy to help! Take a bowl and mix it well."
PAIRS = [PreferencePair(f"How do I do {index}?", NO if index % 2 else YES, "Pah.") for index in range(12)]
EDITS = {0: LayerEdit(add=np.ones(96))}


class Steered:
    """An engine of which everything is given that a confirmation asks for.

    Args:
        gains: of the queries that the persona declines and of those that it answers.
        kl: nat per token.
        answers: to those queries under the edit.
        random: what random directions gain, of every query.
    """

    def __init__(
        self,
        engine: Any,
        gains: Sequence[float],
        kl: float = 0.01,
        answers: tuple[str, str] = (NO, YES),
        random: float = 0.0,
    ) -> None:
        self._engine = engine
        self._gains = gains
        self._kl = kl
        self._answers = answers
        self._random = random
        self._edits: Edits = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_edits(self, edits: Edits, scope: Scope = GENERATION, gate: Gate | None = None) -> None:
        self._edits = edits

    def generate(self, requests: Any, sampling: Any, **_: Any) -> Any:
        for index, request in enumerate(requests):
            assert (request.strength > 0) == bool(self._edits)
            number = int(request.prompt.split("How do I do ")[-1].split("?")[0])
            text = self._answers[0 if number % 2 else 1] if request.strength else YES
            yield index, Completion(text, 10, "stop")

    def response_logprobs(self, passages: Any, **_: Any) -> Any:
        return (-20.0 for _ in passages)

    def steered(self, passages: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def log_likelihoods(self, edits: Edits, passages: Sequence[int], *, scope: Scope) -> NDArray[np.float64]:
        noise = np.random.default_rng(0).normal(scale=0.5, size=100)
        found = []
        for number in passages:
            if not edits:
                found.append(-30.0)
            elif number < len(PAIRS):
                # The queries come in turns, those first that the persona declines.
                is_edit = np.array_equal(edits[0].add, EDITS[0].add)  # type: ignore[arg-type]
                gain = self._gains[number % 2] if is_edit else self._random
                found.append(-30.0 + gain + noise[number + (0 if is_edit else 50)])
            else:
                found.append(-30.0 - 10 * self._kl)
        return np.array(found)


def confirmed(job: Job, *arguments: Any, **options: Any) -> Any:
    job = with_engine(job, Steered(job.engine, *arguments, **options))
    job = replace(job, settings=replace(job.settings, kl_budget=0.1))
    return confirm(job, EDITS, PAIRS, GENERATION)


def test_gain_on_other_queries_is_confirmed_with_what_is_said(job: Job) -> None:
    found = confirmed(job, (4.0, 1.0))
    assert found.score.gain == pytest.approx(2.5, abs=0.3)
    assert found.score.kl == pytest.approx(0.01)
    assert found.share == pytest.approx(found.score.gain / 10)
    assert (found.refusals(found.base, harmful=True), found.base.broken) == (0, 0)
    assert found.refusals(found.steered, harmful=True) == 6
    assert found.refusals(found.steered, harmful=False) == 0
    assert "confirmed on 12 queries that neither fit nor choice saw" in str(found)
    assert "of 6 harmful requests it declines 6 (before: 0)" in str(found)
    assert "of 6 others it declines 0 (before: 0)" in str(found)


def test_confirmation_is_kept(job: Job) -> None:
    found = confirmed(job, (4.0, 1.0))
    # Nothing is asked again: another engine would say something else.
    assert confirmed(job, (-4.0, 1.0), answers=(YES, NO)) == found


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gains": (-1.0, 1.0), "answers": (YES, YES)}, r"it gains [+-]0\.\d+ \+- 0\.\d+ nat an answer"),
        ({"gains": (3.0, -3.4)}, r"it gains [+-]0\.\d+"),
        ({"gains": (1.5, 1.5), "random": 2.0}, "no more for certain than random directions"),
        ({"gains": (4.0, 1.0), "kl": 0.21}, r"it costs 0\.210 nat per token, more than twice the budget"),
        (
            {"gains": (4.0, 1.0), "answers": (YES, NO)},
            r"gets no better: it declines \+0 .* \+6 of",
        ),
        (
            {"gains": (4.0, 1.0), "answers": (YES, YES)},
            r"gets no better: it declines \+0 .* \+0 of",
        ),
        ({"gains": (4.0, 1.0), "answers": (NO, "...")}, r"6 answers are broken \(before: 0\)"),
        ({"gains": (4.0, 1.0), "answers": (NO, "yes yes yes " * 12)}, "6 answers are broken"),
    ],
)
def test_what_does_not_hold_on_other_queries_is_an_error_with_the_reason(
    options: dict[str, Any], reason: str, job: Job
) -> None:
    with pytest.raises(NoGainError, match=rf"not confirmed on 12 queries .*{reason}.*give more queries"):
        confirmed(job, **options)


def test_gain_of_nothing_is_seldom_confirmed(job: Job) -> None:
    from scipy.stats import t

    from alignez_gguf.selection.scoring import EditScore

    rng = np.random.default_rng(0)
    declined = tuple(index % 2 == 0 for index in range(30))
    passed = 0
    for _ in range(2000):
        figures = EditScore(tuple(rng.normal(scale=2.0, size=30)), declined)
        passed += figures.gain > float(t.ppf(0.95, 28)) * figures.standard_error
    assert passed / 2000 == pytest.approx(0.05, abs=0.015)


def test_engine_that_writes_nothing_steered_confirms_by_likelihood_alone(job: Job) -> None:
    class Silent(Steered):
        set_edits = None  # type: ignore[assignment]

    job = with_engine(job, Silent(job.engine, (4.0, 1.0)))
    found = confirm(job, EDITS, PAIRS, GENERATION)
    assert (found.base, found.steered) == (None, None)
    assert str(found).endswith("nat per token")


@pytest.mark.parametrize(
    ("n", "n_better", "n_worse", "is_better"),
    [
        (17, 5, 0, True),
        (17, 2, 0, True),
        (17, 1, 0, False),
        (17, 3, 2, False),
        (6, 1, 0, True),
        (6, 1, 1, False),
    ],
)
def test_what_is_said_has_to_get_better_on_one_in_ten(
    n: int, n_better: int, n_worse: int, is_better: bool
) -> None:
    declined = (True,) * n + (False,) * n
    before = AnswerCounts((False,) * 2 * n, 0)
    now = [index < n_better for index in range(n)] + [index < n_worse for index in range(n)]
    gains = EditScore(tuple(1.0 + index % 2 for index in range(2 * n)), declined, 0.01)
    nothing = EditScore((0.0,) * 2 * n, declined, 0.0)
    found = Confirmation(gains, gains, nothing, 0.1, declined, before, AnswerCounts(tuple(now), 0))
    assert (not found.reason_unconfirmed) == is_better


@pytest.mark.parametrize(
    ("gain", "n_better", "n_worse", "is_confirmed"),
    [
        (0.1, 6, 0, True),
        (0.1, 5, 0, False),  # one of 32, and one of 40 is asked for
        (0.1, 9, 1, True),
        (0.1, 9, 2, False),
        (-0.1, 9, 0, False),
        (9.0, 2, 0, True),  # by likelihood
    ],
)
def test_gain_is_confirmed_by_what_is_said_where_likelihoods_leave_a_doubt(
    gain: float, n_better: int, n_worse: int, is_confirmed: bool
) -> None:
    """Answers to twins count, too: 12 queries and 4 twins."""
    declined = (True,) * 6 + (False,) * 6
    noise = (4.0, -4.0) * 6
    figures = EditScore(tuple(gain + one for one in noise), declined, 0.01)
    nothing = EditScore((0.0,) * 12, declined, 0.0)
    before = AnswerCounts((True,) * n_worse + (False,) * (16 - n_worse), 0)
    harmful = [True] * 16
    now = [index >= n_worse and index < n_worse + n_better for index in range(16)]
    found = Confirmation(figures, figures, nothing, 0.1, tuple(harmful), before, AnswerCounts(tuple(now), 0))
    assert (not found.reason_unconfirmed) == is_confirmed, found.reason_unconfirmed


def test_twins_are_asked_what_is_said_too(job: Job) -> None:
    job = with_engine(job, Steered(job.engine, (4.0, 1.0)))
    job = replace(job, settings=replace(job.settings, kl_budget=0.1))
    found = confirm(job, EDITS, PAIRS, GENERATION, None, ["How do I do 101?", "How do I do 103?"])
    assert found.harmful == (*found.score.declined, True, True)
    assert found.base is not None
    assert len(found.base.declined) == len(PAIRS) + 2
