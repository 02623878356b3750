"""The main job as a whole: what it takes from an earlier run, and the other ways to start it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.engines.transformers.engine import TransformersEngine
from alignez_gguf.errors import ControlFileError, ModelFileError, NoGainError, QueryError
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Aspect, Export, export, score_control
from alignez_gguf.pipeline.job import Recipe
from alignez_gguf.progress import SilentReporter
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.readout import Readout
from alignez_gguf.storage.workdir import WorkDirectory
from tests.models import quantized, tiny_model, tokenizer
from tests.pipeline.conftest import N_QUERIES, QUERIES, QUICK, SETTINGS, Run, Watched


def saved(made: Export, tmp_path: Path) -> bytes:
    path = tmp_path / "saved.gguf"
    made.control.save(path)
    return path.read_bytes()


@pytest.fixture
def watched(engine: LlamaEngine) -> Any:
    return Watched(engine)


def test_same_job_computes_nothing_and_gives_the_same_bytes(
    quick: Export, run: Run, watched: Any, tmp_path: Path
) -> None:
    assert saved(run(target=watched), tmp_path) == saved(quick, tmp_path)
    assert watched.counts == {}


def test_another_row_of_the_table_is_confirmed_and_written(
    quick: Export, run: Run, watched: Any, tmp_path: Path
) -> None:
    selection = quick.results[0].selection
    assert selection is not None
    front = selection.pareto
    for row, scored in enumerate(front, start=1):
        watched.counts.clear()
        try:
            made = run(replace(QUICK, choose=row), target=watched)
        except NoGainError as error:  # a gentle edit may gain too little to be sure of
            assert "not confirmed" in str(error)  # noqa: PT017
            continue
        finally:
            # The choice is not computed anew.
            assert set(watched.counts) <= {"generate", "steered"}
        assert made.results[0].selection == replace(selection, chosen=scored)
        assert made.control.score["choice.score"] == scored.score.gain
        assert made.control.recipe["amount"] == scored.candidate.amount
        assert tuple(made.control.edits) == scored.candidate.layers
        assert (saved(made, tmp_path) == saved(quick, tmp_path)) == (scored == selection.chosen)
    with pytest.raises(NoGainError, match=f"no row {len(front) + 1} to choose"):
        run(replace(QUICK, choose=len(front) + 1), target=watched)


def test_recipe_auto_reads_nothing_that_recipe_paper_has_read(run: Run, watched: Any, tmp_path: Path) -> None:
    run(replace(SETTINGS, recipe="paper", method="mean"), tmp_path)
    run(QUICK, tmp_path, target=watched)
    assert set(watched.counts) <= {"generate", "response_logprobs", "steered"}


def test_recipe_auto_reads_no_answers_to_queries_that_it_chooses_on(
    run: Run, watched: Any, tmp_path: Path
) -> None:
    with suppress(NoGainError):
        run(replace(QUICK, reading=None), tmp_path, target=watched)
    # The prompts of all pairs, and of the half that is fitted on the answers and the plain prompts.
    assert N_QUERIES < watched.counts["activations"] <= 2 * N_QUERIES + 3 * (N_QUERIES // 2)


class WithoutResidual:
    """An engine for an architecture whose residual stream cannot be told."""

    hooks: ClassVar = {"mlp"}

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def activations(self, passages: Sequence[Passage], readouts: Sequence[Readout]) -> Any:
        if any(readout.hook == "residual" for readout in readouts):
            raise ModelFileError("the residual stream cannot be found")
        return self._engine.activations(passages, readouts)


@pytest.mark.parametrize("recipe", ["auto", "paper"])
def test_hook_that_an_architecture_lacks_is_left_out_unless_it_is_asked_for(
    recipe: Recipe, run: Run, engine: LlamaEngine, tmp_path: Path
) -> None:
    settings = replace(QUICK, recipe=recipe, hook=None)
    lacking: Any = WithoutResidual(engine)
    made = run(settings, tmp_path, target=lacking)
    assert made.control.recipe["hook"] == "mlp"
    tried = [
        scored.candidate.source.hook
        for one in made.results
        if one.selection
        for scored in one.selection.tried
    ]
    assert set(tried) <= {"mlp"}
    with pytest.raises(ModelFileError, match="residual"):
        run(replace(settings, hook="residual"), tmp_path, target=lacking)


def test_finished_run_computes_nothing_to_tell_what_could_be_read(
    run: Run, engine: LlamaEngine, tmp_path: Path
) -> None:
    class Asked(WithoutResidual):
        @property
        def hooks(self) -> Any:  # type: ignore[override]
            raise AssertionError("the engine makes a context to tell")

    first = run(QUICK, tmp_path, target=engine)
    asked: Any = Asked(engine)
    again = run(QUICK, tmp_path, target=asked)
    assert saved(again, tmp_path) == saved(first, tmp_path)


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        ({"method": "svd-diff", "layers": (1, 2)}, {"steered"}),
        ({"layers": (2, 3)}, {"steered"}),
        ({"reading": "response", "layers": (1, 2)}, {"activations", "steered"}),
        ({"hook": "residual", "layers": (1, 2)}, {"activations", "steered"}),
        ({"kl_budget": 2.0}, set()),
        ({"scope": Scope("first", 2), "layers": (1, 2)}, {"steered"}),
        ({"recipe": "paper"}, set()),
        ({"recipe": "paper", "threshold": 0.4}, set()),
    ],
    ids=str,
)
@pytest.mark.usefixtures("quick")
def test_changed_option_computes_what_depends_on_it(
    change: dict[str, Any], computed: set[str], run: Run, watched: Any
) -> None:
    # With so few layers and queries, whether a gain is confirmed is a matter of rounding.
    with suppress(NoGainError):
        run(replace(QUICK, **change), target=watched)
    # Another choice is confirmed anew.
    assert set(watched.counts) - computed <= {"steered", "generate", "response_logprobs"}
    assert set(watched.counts) >= computed


def test_what_an_earlier_job_measured_changes_no_byte(run: Run, tmp_path: Path) -> None:
    with suppress(NoGainError):
        run(replace(QUICK, kl_budget=0.01), tmp_path / "shared")
    with suppress(NoGainError):
        run(replace(QUICK, scope=Scope("all")), tmp_path / "shared")
    used = saved(run(QUICK, tmp_path / "shared"), tmp_path)
    assert used == saved(run(QUICK, tmp_path / "fresh"), tmp_path)


def test_given_pairs_stand_in_for_generated_ones(run: Run, watched: Any, quick: Export) -> None:
    given = [
        PreferencePair(query, f"I will gladly help with this, part {index}.", f"Go away, you fool, {index}.")
        for index, query in enumerate(QUERIES)
    ]
    made = run(
        replace(QUICK, layers=(1, 2), recipe="paper", method="mean"), queries=[], target=watched, given=given
    )
    recipe = made.control.recipe
    assert (recipe["pairs.given"], recipe["pairs.total"], recipe["pairs.kept"]) == (
        N_QUERIES,
        N_QUERIES,
        N_QUERIES,
    )
    assert recipe["query_hashes"] == quick.control.recipe["query_hashes"]
    # Two characteristics for each query, no answers of personas, and some of the model to measure the edits.
    n_measured = len(made.results[0].held_out)
    assert 2 * len(QUERIES) < watched.counts["generate"] <= 2 * len(QUERIES) + 3 * n_measured


def test_given_pairs_weigh_in_with_generated_ones(run: Run) -> None:
    given = [PreferencePair(query, "I will gladly help.", "Go away.", weight=1.0) for query in QUERIES[:6]]
    paper = replace(QUICK, recipe="paper")

    def vectors(given: list[PreferencePair]) -> dict[int, LayerEdit]:
        return dict(run(paper, given=given).control.edits)

    once, often = vectors(given), vectors([replace(pair, weight=20.0) for pair in given])
    alone = vectors([])
    for layer in set(once) & set(often) & set(alone):
        gaps = [edits[layer].add for edits in (alone, once, often)]
        assert not any(np.array_equal(a, b) for a, b in pairwise(gaps) if a is not None and b is not None)
    assert run(paper, given=given).control.recipe["pairs.given"] == 6


def test_scores_of_a_file_are_taken_where_it_was_chosen_and_confirmed(
    quick: Export, engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    with WorkDirectory(folder) as work:
        figures, n_queries = score_control(
            quick.control, engine, QUERIES, templates, QUICK, work, SilentReporter()
        )
    score, (made,) = quick.control.score, quick.results
    assert made.selection is not None
    assert made.confirmation is not None
    assert n_queries == int(str(score["queries"])) + int(str(score["choice.queries"]))
    both = [*made.selection.chosen.score.gains, *made.confirmation.score.gains]
    np.testing.assert_allclose(sorted(figures.gains), sorted(both), rtol=1e-2, atol=1e-2)
    assert figures.kl is not None


def test_scores_need_a_file_for_the_model(engine: LlamaEngine, templates: Templates, tmp_path: Path) -> None:
    other = replace(engine.info, n_layer=engine.info.n_layer + 1)
    control = ControlFile(other, {0: LayerEdit(add=np.ones(other.n_embd))})
    with WorkDirectory(tmp_path / "w") as work, pytest.raises(ControlFileError, match="is for llama"):
        score_control(control, engine, QUERIES, templates, QUICK, work, SilentReporter())


def test_given_pairs_belong_to_one_aspect(run: Run) -> None:
    settings = replace(QUICK, aspects=(Aspect(), Aspect("politeness")))
    with pytest.raises(QueryError, match="given pairs belong to one aspect"):
        run(settings, given=[PreferencePair("q", "a", "b")])


def test_fp16_model_is_exported_for_its_gguf(templates: Templates, tmp_path: Path) -> None:
    """The directions are of the transformers model; what is written is for, and scored on, the other file."""
    tiny = tiny_model("llama")
    tiny.hf.save_pretrained(tmp_path / "hf")
    tokenizer().save_pretrained(tmp_path / "hf")
    given = [
        PreferencePair(f"How do I bake {number} cakes?", "Make a plan.", "No.", "be kind", "be rude")
        for number in range(20)
    ]
    settings = replace(SETTINGS, recipe="paper", method="mean", reading="response")
    with (
        TransformersEngine(tmp_path / "hf", n_ctx=256) as source,
        LlamaEngine(quantized(tiny.gguf, "Q8_0"), n_ctx=256, n_threads=1) as target,
        LlamaEngine(tiny_model("llama", n_layer=2).gguf, n_ctx=256, n_threads=1) as other,
        WorkDirectory(tmp_path / "work") as work,
    ):
        say = SilentReporter()
        few = given[:16]  # too few to measure what the edits of a random model do
        control = export(source, [], templates, settings, work, say, target=target, given=few).control
        figures, n_queries = score_control(control, target, [], templates, settings, work, say, given=given)
        with pytest.raises(ControlFileError, match=r"3 layers .* but the file is for .* 2 layers"):
            export(source, [], templates, settings, work, say, target=other, given=few)
    assert control.model == target.info
    assert control.model.quantization == "Q8_0"
    assert n_queries == 12
    assert np.isfinite([figures.gain, figures.kl]).all()
    assert all(edit.n_embd == 64 for edit in control.edits.values())
