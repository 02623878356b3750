"""Several aspects in one control file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import NoGainError, TemplateError
from alignez_gguf.pipeline import Aspect, Export
from alignez_gguf.pipeline.aspects import combine
from alignez_gguf.prompts.templates import Templates
from tests.pipeline.conftest import QUICK, Run

N_EMBD = 16
ASPECTS = (Aspect("safety"), Aspect("order", 0.5))


def random_edit(seed: int, rank: int = 0, *, adds: bool = False) -> LayerEdit:
    normal = np.random.default_rng(seed).standard_normal
    return LayerEdit(add=normal(N_EMBD) if adds else None, remove=normal((rank, N_EMBD)) if rank else None)


def test_removals_span_one_subspace_and_additions_are_summed() -> None:
    first = {0: random_edit(0, 2, adds=True), 1: random_edit(1, 1)}
    second = {0: random_edit(2, 1, adds=True), 3: random_edit(3, adds=True)}
    edits = combine([(first, 1.0), (second, 0.25)])
    assert list(edits) == [0, 1, 3]
    removed = edits[0].remove
    assert removed is not None
    np.testing.assert_allclose(removed @ removed.T, np.eye(3), atol=1e-6)
    stacked = np.concatenate([first[0].remove, second[0].remove])  # type: ignore[list-item]
    projection = stacked.T @ np.linalg.pinv(stacked.T)
    np.testing.assert_allclose(removed.T @ removed, projection, atol=1e-5)
    np.testing.assert_allclose(edits[0].add, first[0].add + 0.25 * second[0].add, rtol=1e-5)  # type: ignore[operator, arg-type]
    np.testing.assert_array_equal(edits[1].remove, first[1].remove)  # type: ignore[arg-type]
    assert edits[1].add is None
    np.testing.assert_allclose(edits[3].add, 0.25 * second[3].add, rtol=1e-6)  # type: ignore[operator, arg-type]
    assert edits[3].remove is None


def test_what_both_remove_is_removed_once() -> None:
    same = {0: random_edit(0, 2)}
    assert combine([(same, 1.0), (same, 1.0)])[0].rank == 2


def test_weight_of_zero_leaves_a_part_out() -> None:
    edits = combine([({0: random_edit(0, 1)}, 0.0), ({1: random_edit(1, 1)}, 1.0)])
    assert list(edits) == [1]


@pytest.fixture(scope="module")
def framing(templates: Templates) -> Templates:
    """An aspect beside safety, with the only personas that the demo model knows."""
    return replace(templates, aspects={"order": (templates.helpful, templates.harmful)})


@pytest.fixture(scope="module")
def both(run: Run, framing: Templates) -> Export:
    return run(replace(QUICK, layers=(1, 2), aspects=ASPECTS, kl_budget=5.0), framing=framing)


def test_every_aspect_is_chosen_for_itself_and_named_in_the_file(both: Export, tmp_path: Any) -> None:
    both.control.save(tmp_path / "both.gguf")
    control = ControlFile.load(tmp_path / "both.gguf")
    recipe, score = control.recipe, control.score
    assert recipe["aspects"] == ("safety", "order")
    assert len(both.results) == len(both.filtered) == 2
    for aspect, made in zip(ASPECTS, both.results, strict=True):
        assert made.selection is not None
        assert recipe[f"{aspect.name}.amount"] == made.selection.chosen.candidate.amount
        assert made.confirmation is not None
        assert score[f"{aspect.name}.score"] == made.confirmation.score.gain
    assert recipe["pairs.total"] == sum(report.total for report in both.filtered)


def test_file_holds_the_combination_and_the_scale_it_took(both: Export) -> None:
    weights = both.control.recipe["aspect_weights"]
    assert isinstance(weights, tuple)
    assert weights[1] == pytest.approx(0.5 * float(weights[0]))
    expected = combine(
        [(made.edits, float(weight)) for made, weight in zip(both.results, weights, strict=True)]
    )
    assert set(both.control.edits) == set(expected)
    for layer, edit in both.control.edits.items():
        for name in ("add", "remove"):
            found, wanted = getattr(edit, name), getattr(expected[layer], name)
            assert (found is None) == (wanted is None)
            if wanted is not None:
                np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_tradeoff_is_told_of_every_aspect(both: Export) -> None:
    score = both.control.score
    assert score["aspects.name"] == ("safety", "order")
    for column, name in (("alone", "score_alone"), ("together", "score_together")):
        gains = tuple(getattr(one, column).gain for one in both.tradeoffs)
        assert score[f"aspects.{name}"] == gains
    # The weight of safety is 1: alone it is what its own table says.
    safety, order = both.tradeoffs
    assert safety.alone.gain == pytest.approx(both.control.score["safety.score"], rel=1e-5)
    assert safety.together.gain != safety.alone.gain
    assert order.together.gain != order.alone.gain


def test_additions_shrink_until_the_whole_is_affordable(run: Run, framing: Templates, both: Export) -> None:
    together = [one.together.kl for one in both.tradeoffs]
    parts = [one.alone.kl for one in both.tradeoffs]
    assert all(kl is not None for kl in (*together, *parts))
    budget = 0.9 * max(kl for kl in together if kl is not None)
    settings = replace(QUICK, layers=(1, 2), aspects=ASPECTS, kl_budget=budget)
    try:
        made = run(settings, framing=framing)
    except NoGainError as error:
        assert "the aspects together cost more than" in str(error)  # noqa: PT017
        return
    assert all(one.together.kl is not None and one.together.kl <= budget for one in made.tradeoffs)


def test_unknown_aspect_is_refused_before_anything_is_computed(run: Run, tmp_path: Any) -> None:
    with pytest.raises(TemplateError, match="no aspect 'speed'"):
        run(replace(QUICK, aspects=(Aspect("speed"),)), tmp_path / "work")
    assert not (tmp_path / "work").exists()
