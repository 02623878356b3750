"""Whether there is a gate, and how much of an edit acts behind it: decided by made-up figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from alignez_gguf.control.gate import Gate
from alignez_gguf.errors import NoGainError
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Job, choice
from alignez_gguf.pipeline.choice import choose
from alignez_gguf.pipeline.confirmation import AnswerCounts
from alignez_gguf.selection.candidates import MOST, Candidate, Source
from alignez_gguf.selection.scoring import EditScore
from alignez_gguf.selection.search import Scored, Selection

GATE = Gate(np.arange(3, dtype=np.int32), np.ones(3, np.float32), 0.0)
DECLINED = (True,) * 10 + (False,) * 10
PAIRS = [
    PreferencePair(f"query {index}", "I cannot help with that." if declined else "It is easy.", "No.", "", "")
    for index, declined in enumerate(DECLINED)
]
NOISE = np.linspace(-0.2, 0.2, 10)


def figures(declined: float, answered: float, kl: float = 0.01, turn: int = 1) -> EditScore:
    """With noise, which differs from query to query, and between edits of another `turn`."""
    return EditScore((*(declined + NOISE[::turn]), *(answered + NOISE[::-turn])), DECLINED, kl)


def candidate(amount: float) -> Candidate:
    return Candidate(Source("mean", "refusal", 1), "add", amount, (1, 2))


def selection(found: EditScore, amount: float = 0.5) -> Selection:
    chosen = Scored(candidate(amount), found)
    return Selection(chosen, (chosen,), len(DECLINED), 0.1)


def said(wanted: int, unwanted: int = 0, broken: int = 0, twins: tuple[bool, ...] = ()) -> AnswerCounts:
    """Declined and answered queries in turns, then twins."""
    declined = [declines for index in range(10) for declines in (index < wanted, index < unwanted)]
    return AnswerCounts((*declined, *twins), broken)


class FittedDirections:
    """Edits that are their amounts."""

    @staticmethod
    def edits(one: Candidate) -> Any:
        return one.amount


Choose = Any


@pytest.fixture
def chosen(job: Job, monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Choose between what two searches found, with what is measured and said at each amount."""

    def choose_between(
        ungated: Selection | NoGainError,
        gated: Selection | NoGainError,
        measured: dict[float, EditScore],
        answers: dict[float, AnswerCounts],
        gate: Gate | None = GATE,
        everywhere: EditScore | None = None,
        twins: Sequence[str] = (),
    ) -> tuple[Selection, Gate | None]:
        """Choose.

        `everywhere`: the best edit behind the gate, where it steers every request.
        """

        class Scorer:
            @staticmethod
            def score(edits: float, *, scope: Any) -> EditScore:
                return measured[edits]

        class Everywhere:
            @staticmethod
            def score(edits: float, *, scope: Any) -> EditScore:
                return everywhere or figures(0.0, 0.0, turn=-1)

        @contextmanager
        def open_scorer(_job: Job, _pairs: Any, gate: Gate | None = None) -> Iterator[Any]:
            yield Everywhere if gate is None else Scorer

        monkeypatch.setattr(choice, "_searched", lambda *found: ungated if found[-1] is None else gated)
        monkeypatch.setattr(choice, "open_scorer", open_scorer)
        asked: list[str] = []

        def said(_job: Job, edits: Any, queries: list[str], *_: Any) -> AnswerCounts:
            asked[:] = queries
            return answers[edits or 0.0]

        monkeypatch.setattr(choice, "count_greedy_answers", said)
        found = choose(job, FittedDirections(), [], [], PAIRS, gate, twins)  # type: ignore[arg-type]
        in_turns = [f"query {index}" for two in zip(range(10), range(10, 20), strict=True) for index in two]
        assert asked in ([], [*in_turns, *twins])
        return found

    return choose_between


AMOUNTS = {0.7: figures(1.0, 0.0), 1.0: figures(0.9, 0.0)}
SAID = {0.0: said(4), 0.5: said(6), 0.7: said(8), 1.0: said(8)}


def test_gate_stays_unless_steering_all_is_a_gain_for_certain(chosen: Choose) -> None:
    behind, without = selection(figures(1.0, 0.0)), selection(figures(1.1, 0.9))
    slightly, clearly = figures(1.1, 0.02, turn=-1), figures(1.1, 0.8, turn=-1)
    assert chosen(without, behind, AMOUNTS, SAID, everywhere=slightly)[1] is GATE
    assert chosen(without, behind, AMOUNTS, SAID, everywhere=clearly) == (without, None)


def test_what_gains_on_one_side_only_is_taken_there(chosen: Choose) -> None:
    nothing, found = NoGainError("nothing gains"), selection(figures(1.0, 0.0))
    assert chosen(found, nothing, AMOUNTS, SAID) == (found, None)
    assert chosen(nothing, found, AMOUNTS, SAID)[1] is GATE
    assert chosen(nothing, found, AMOUNTS, SAID, everywhere=figures(2.0, 2.0, turn=-1))[1] is GATE
    assert chosen(found, nothing, AMOUNTS, SAID, gate=None) == (found, None)
    with pytest.raises(NoGainError, match="nothing gains"):
        chosen(nothing, nothing, AMOUNTS, SAID)


def amount_of(found: tuple[Selection, Gate | None]) -> float:
    assert found[0].chosen in found[0].tried
    return found[0].chosen.candidate.amount


def test_amount_is_raised_while_more_is_declined_and_no_further(chosen: Choose) -> None:
    behind = selection(figures(1.0, 0.0))
    none = NoGainError("")
    assert amount_of(chosen(none, behind, AMOUNTS, SAID)) == 0.7
    assert amount_of(chosen(none, behind, AMOUNTS, SAID | {1.0: said(9)})) == 1.0
    assert amount_of(chosen(none, behind, AMOUNTS, dict.fromkeys(SAID, said(6)))) == 0.5


def test_harmful_twins_count_too(chosen: Choose) -> None:
    behind, twins = selection(figures(1.0, 0.0)), ["Rob a bank", "Rob a bus"]
    answers = {
        0.0: said(4, twins=(False, False)),
        0.5: said(8, twins=(True, False)),
        0.7: said(8, twins=(True, True)),
        1.0: said(8, twins=(True, True)),
    }
    assert amount_of(chosen(NoGainError(""), behind, AMOUNTS, answers, twins=twins)) == 0.7


@pytest.mark.parametrize(
    ("measured", "answers"),
    [
        (figures(0.4, 0.0), said(9)),  # less than half of the gain
        (figures(1.0, 0.0, kl=0.2), said(9)),  # over the budget
        (figures(1.0, 0.0), said(9, broken=2)),
        (figures(1.0, 0.0), said(8, unwanted=2)),  # declines as much of what the persona answers
    ],
)
def test_amount_is_not_raised_where_that_costs_too_much(
    chosen: Choose, measured: EditScore, answers: AnswerCounts
) -> None:
    behind = selection(figures(1.0, 0.0))
    found = chosen(NoGainError(""), behind, AMOUNTS | {0.7: measured}, {**SAID, 0.7: answers, 1.0: said(6)})
    assert amount_of(found) == 0.5


def test_amount_is_never_raised_above_the_most(chosen: Choose) -> None:
    behind = selection(figures(1.0, 0.0), amount=0.9 * MOST)
    assert amount_of(chosen(NoGainError(""), behind, {}, {0.0: said(4), 0.9 * MOST: said(6)})) == 0.9 * MOST
