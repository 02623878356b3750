"""The choice of an edit, on models whose every edit can be measured."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.errors import NoGainError
from alignez_gguf.selection.candidates import AMOUNTS, Candidate, Source, first_candidates, neighbours, spans
from alignez_gguf.selection.scoring import EditScore, Scorer
from alignez_gguf.selection.search import ROUNDS, Scored, Search, Selection, random_edits

N_QUERIES, N_LAYER = 20, 16
LAYERS = tuple(range(N_LAYER))
SOURCES = [
    Source("mean", "verdict", 1),
    Source("mean", "prompt", 1),
    Source("ccs", "response", 1),
    Source("svd-diff", "prompt", 3),
]
BEGINNING = Scope("first", 6)
DECLINED = tuple(index % 2 == 0 for index in range(N_QUERIES))
N_OWN = 5


@dataclass
class FakeModel:
    """A model on which the gain and the cost of any candidate are functions of it."""

    gain_of: Callable[[Candidate], float]
    kl_of: Callable[[Candidate], float] = lambda _: 0.01
    noise: float = 0.0
    known: list[Candidate] = field(default_factory=list)
    asked: list[tuple[Candidate, int]] = field(default_factory=list)
    """What was asked for, and for how many passages."""

    def edits_of(self, candidate: Candidate) -> Edits:
        """A candidate as edits that name it."""
        if candidate not in self.known:
            self.known.append(candidate)
        number = self.known.index(candidate) + 1
        return {layer: LayerEdit(add=[float(number)]) for layer in candidate.layers}

    def log_likelihoods(self, edits: Edits, passages: Sequence[int], *, scope: Scope) -> NDArray[np.float64]:
        add = next(iter(edits.values())).add
        assert add is not None
        candidate = self.known[round(float(add[0])) - 1]
        self.asked.append((candidate, len(passages)))
        drawn = np.random.default_rng(zlib.crc32(repr(candidate).encode())).normal(size=N_QUERIES)
        gains = self.gain_of(candidate) + self.noise * drawn
        own = np.full(N_OWN, -10.0 * self.kl_of(candidate))
        return np.concatenate([gains, own])[list(passages)]


def searching(model: FakeModel, **more: Any) -> Search:
    base = np.zeros(N_QUERIES + N_OWN)
    scorer = Scorer(model, DECLINED, (10,) * N_OWN, base, (True,) * len(base))
    return Search(scorer, model.edits_of, **more)


def search(model: FakeModel, **more: Any) -> Selection:
    return searching(model, **more).run(SOURCES, LAYERS)


def table(seed: int) -> Callable[[Candidate], float]:
    """A random gain for every candidate."""

    def gain(candidate: Candidate) -> float:
        random = np.random.default_rng(zlib.crc32(f"{seed} {candidate!r}".encode()))
        return float(random.uniform(-1, 1))

    return gain


def test_other_scopes_are_tried_where_they_may_be() -> None:
    """The beginning of an answer gains more here, and of it a larger amount."""

    def gain(candidate: Candidate) -> float:
        if candidate.scope == BEGINNING:
            return 2.0 + candidate.amount
        return 1.0 - candidate.amount

    chosen = search(FakeModel(gain), scopes=(GENERATION, BEGINNING)).chosen.candidate
    assert chosen.scope == BEGINNING
    assert chosen.amount > max(AMOUNTS["add"])
    assert all(
        scored.candidate.scope == BEGINNING for scored in search(FakeModel(gain), scopes=(BEGINNING,)).tried
    )
    assert all(scored.candidate.scope == GENERATION for scored in search(FakeModel(gain)).tried)


@pytest.mark.parametrize("seed", range(5))
def test_best_of_the_first_candidates_or_a_neighbour_of_it_is_chosen(seed: int) -> None:
    model = FakeModel(table(seed))
    found = search(model)

    first = first_candidates(SOURCES, LAYERS)
    assert found.chosen.score.gain >= max(map(model.gain_of, first))


def test_weak_candidates_are_measured_on_few_queries_and_the_best_on_all() -> None:
    model = FakeModel(table(0))
    found = search(model)

    counts = [len(scored.score.gains) for scored in found.tried]
    assert set(counts) == {ROUNDS[0][0], ROUNDS[1][0], N_QUERIES}
    assert counts == sorted(counts, reverse=True)
    first = set(first_candidates(SOURCES, LAYERS))
    of_first = [len(scored.score.gains) for scored in found.tried if scored.candidate in first]
    assert of_first.count(ROUNDS[0][0]) >= len(first) - ROUNDS[0][1] - 12
    assert of_first.count(N_QUERIES) <= 2 * ROUNDS[1][1]
    # Nobody is asked about the same query twice.
    gains = [(one, count) for one, count in model.asked if count != N_OWN]
    for scored in found.tried:
        asked = sum(count for one, count in gains if one == scored.candidate)
        assert asked == len(scored.score.gains)


def test_first_queries_hold_both_kinds() -> None:
    found = search(FakeModel(table(0)))
    for scored in found.tried:
        assert sum(scored.score.declined) * 2 == len(scored.score.declined)


def test_best_one_is_refined_in_amount_and_layers() -> None:
    def gain(candidate: Candidate) -> float:
        amount = -abs(np.log(max(candidate.amount, 1e-3) / 0.35))
        wrong = set(candidate.layers) ^ set(range(8, 12))
        return 5 + amount - 0.1 * len(wrong) if candidate.source == SOURCES[0] else 0.1

    chosen = search(FakeModel(gain)).chosen.candidate
    assert chosen.source == SOURCES[0]
    assert chosen.amount == pytest.approx(0.35)
    assert chosen.layers == (8, 9, 10, 11)


def test_second_best_source_is_refined_too() -> None:
    """The best one at first need not be the best one in the end."""

    def gain(candidate: Candidate) -> float:
        if candidate.source == SOURCES[1]:
            return 2.0 - 0.1 * len(set(candidate.layers) ^ set(range(8)))
        return 1.0 if candidate.source == SOURCES[0] else 0.1

    assert search(FakeModel(gain)).chosen.candidate.layers == tuple(range(8))


def test_what_costs_more_than_the_budget_is_not_chosen() -> None:
    model = FakeModel(table(1), kl_of=lambda candidate: candidate.amount)
    found = search(model, budget=0.2)
    assert found.chosen.score.kl is not None
    assert found.chosen.score.kl <= 0.2
    assert found.chosen.candidate.amount <= 0.2
    better = [one for one in found.tried if one.score.gain > found.chosen.score.gain]
    assert all(
        one.score.kl is None or one.score.kl > 0.2 for one in better if len(one.score.gains) == N_QUERIES
    )


def test_nothing_gains() -> None:
    with pytest.raises(NoGainError, match=r"nothing brings .* the best of \d+ edits, .* gains -0\.100"):
        search(FakeModel(lambda _: -0.1))


def test_everything_that_gains_is_over_the_budget() -> None:
    with pytest.raises(NoGainError, match=r"gains \+1\.000 .* at 0\.3 nat per token.*raise --kl-budget"):
        search(FakeModel(lambda _: 1.0, kl_of=lambda _: 0.3))


def test_directions_that_edit_nothing_are_an_error_too() -> None:
    model = FakeModel(table(0))
    base = np.zeros(N_QUERIES + N_OWN)
    empty = Search(Scorer(model, DECLINED, (10,) * N_OWN, base, (True,) * len(base)), lambda _: {})
    with pytest.raises(NoGainError, match="no direction was found"):
        empty.run(SOURCES, LAYERS)


def test_verdicts_are_added_and_never_removed() -> None:
    operations = {one.operation for one in first_candidates(SOURCES, LAYERS) if one.source == SOURCES[0]}
    assert operations == {"add"}


def test_spans_are_all_layers_and_those_behind_the_middle() -> None:
    assert spans(LAYERS) == [LAYERS, tuple(range(6, 14))]
    assert spans(tuple(range(28)))[1] == tuple(range(11, 25))
    assert spans((1, 2, 3)) == [(1, 2, 3)]


def test_neighbours_differ_in_one_thing() -> None:
    candidate = Candidate(SOURCES[3], "remove+add", 0.5, (0, 1, 2, 3, 6))
    near = neighbours(candidate, LAYERS)
    assert {one.amount for one in near} == {0.0, 0.35, 0.5, 0.7, 1.0}
    assert {one.operation for one in near} == {"remove", "remove+add"}
    assert {one.source.rank for one in near} == {2, 3}
    spans_of = {one.layers for one in near}
    assert {(2, 3, 6), (0, 1, 6), (0, 1, 2, 3, 6, 7), (0, 1, 2, 3, 4, 5, 6)} < spans_of
    for one in near:
        same = [getattr(one, name) == getattr(candidate, name) for name in ("source", "layers")]
        same.append((one.operation, one.amount) == (candidate.operation, candidate.amount))
        assert same.count(False) == 1
    bare = neighbours(replace(candidate, operation="remove", amount=0.0), LAYERS)
    assert {one.operation for one in bare} == {"remove", "remove+add"}
    added = neighbours(replace(candidate, operation="add", layers=(0, 1)), LAYERS)
    assert {one.operation for one in added} == {"add"}
    assert all(one.layers for one in added)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("after", [0, 1, 30, 60, 75])
def test_search_that_was_stopped_anywhere_goes_on_to_the_same_end(after: int) -> None:
    known: dict[Candidate, EditScore] = {}
    whole = search(FakeModel(table(2)))
    stopping = FakeModel(table(2))

    def gain(candidate: Candidate) -> float:
        if len(stopping.asked) > after:
            raise Stop
        return table(2)(candidate)

    stopping.gain_of = gain
    with pytest.raises(Stop):
        search(stopping, known=known)
    going_on = FakeModel(table(2))
    assert search(going_on, known=known) == whole
    assert len(going_on.asked) < len(stopping.asked) + len(going_on.asked)
    again = FakeModel(table(2))
    assert search(again, known=known) == whole
    assert again.asked == []


def test_search_is_deterministic_also_where_gains_are_equal() -> None:
    assert search(FakeModel(lambda _: 1.0)) == search(FakeModel(lambda _: 1.0))


def test_every_comparison_is_told() -> None:
    told: list[int] = []
    model = FakeModel(table(0))
    search(model, advance=told.append)
    assert sum(told) >= len([count for _, count in model.asked if count != N_OWN])
    assert set(told) == {1}


def test_pareto_rows_are_those_that_nothing_beats() -> None:
    found = search(FakeModel(table(4), kl_of=lambda one: 0.01 + 0.05 * one.amount + 0.001 * len(one.layers)))
    measured = [one for one in found.tried if one.score.kl is not None and one.score.gain > 0]
    for one in measured:
        beaten = any(
            (other.score.kl or 0) <= (one.score.kl or 0) and other.score.gain > one.score.gain
            for other in measured
        )
        assert (one in found.pareto) != beaten
    assert found.pareto == sorted(found.pareto, key=lambda one: one.score.kl or 0)


def test_another_row_of_the_table_can_be_chosen() -> None:
    def scored(gain: float, kl: float) -> Scored:
        return Scored(Candidate(SOURCES[0], "add", gain, LAYERS), EditScore((gain,) * 4, DECLINED[:4], kl))

    rows = (scored(3.0, 0.3), scored(2.0, 0.2), scored(1.5, 0.25), scored(1.0, 0.1))
    found = Selection(rows[0], rows, 4, 0.5)
    assert found.pareto == [rows[3], rows[1], rows[0]]
    assert found.choose(2).chosen == rows[1]
    for row in (0, 4):
        with pytest.raises(NoGainError, match=f"no row {row} to choose; the table has rows 1 to 3"):
            found.choose(row)


def test_random_edits_have_the_ranks_and_lengths_of_what_they_are_compared_with() -> None:
    normal = np.random.default_rng(0).standard_normal
    edits = {
        0: LayerEdit(remove=normal((2, 64))),
        3: LayerEdit(add=3 * normal(64), remove=normal((1, 64))),
        5: LayerEdit(add=normal(64)),
    }
    random = random_edits(edits, seed=1)
    assert list(random) == list(edits)
    for layer, edit in edits.items():
        other = random[layer]
        assert (other.decision, other.rank) == (edit.decision, edit.rank)
        assert other.scale == pytest.approx(edit.scale, rel=1e-5)
        if edit.add is not None and other.add is not None:
            assert abs(edit.add @ other.add) < 0.5 * edit.scale**2
    again, another = random_edits(edits, seed=1), random_edits(edits, seed=2)
    np.testing.assert_array_equal(again[5].add, random[5].add)  # type: ignore[arg-type]
    assert not np.array_equal(another[5].add, random[5].add)  # type: ignore[arg-type]
