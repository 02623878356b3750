"""What the recipes make of the pairs, and what they write of it into the control file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf import __version__
from alignez_gguf.candidates import Source, span
from alignez_gguf.control import ControlFile
from alignez_gguf.directions import METHODS
from alignez_gguf.edits import LayerEdit
from alignez_gguf.engines.llama import LlamaEngine
from alignez_gguf.errors import NoGainError, QueryError, SteeringError
from alignez_gguf.generation import answer_prompts
from alignez_gguf.pairs import PreferencePair
from alignez_gguf.pipeline import Export, Job, Settings, self_generated_pairs
from alignez_gguf.pipeline.recipes import SCOPE_MARGIN, SEARCHED, Made, sources, split
from alignez_gguf.progress import SilentReporter
from alignez_gguf.prompts import Templates
from alignez_gguf.scope import Scope
from alignez_gguf.workdir import WorkDirectory
from tests.pipeline.conftest import N_QUERIES, QUERIES, QUICK, SETTINGS, Run

PAPER = replace(SETTINGS, recipe="paper", seed=3)


@pytest.fixture(scope="module")
def paper(run: Run) -> Export:
    return run(PAPER)


def reloaded(made: Export, tmp_path: Path) -> ControlFile:
    made.control.save(tmp_path / "control.gguf")
    return ControlFile.load(tmp_path / "control.gguf")


def test_paper_recipe_is_ccs_on_responses_with_the_decision_rule(
    paper: Export, engine: LlamaEngine, tmp_path: Path
) -> None:
    control = reloaded(paper, tmp_path)
    (filtered,) = paper.filtered
    recipe = dict(control.recipe)
    hashes = recipe.pop("query_hashes")
    assert isinstance(hashes, tuple)
    assert len(set(hashes)) == N_QUERIES
    assert recipe == {
        "name": "paper",
        "method": "ccs",
        "reading": "response",
        "hook": "mlp",
        "rank": 1,
        "threshold": 0.5,
        "seed": 3,
        "aspects": ("safety",),
        "aspect_weights": (1.0,),
        "template_version": paper.control.recipe["template_version"],
        "framing": "transcript",
        "package_version": __version__,
        "pairs.total": N_QUERIES,
        "pairs.kept": filtered.kept,
        "pairs.empty": filtered.empty,
        "pairs.identical": filtered.identical,
        "pairs.near_identical": filtered.near_identical,
        "pairs.persona_ignored": filtered.persona_ignored,
        "pairs.truncated": filtered.truncated,
        "pairs.given": 0,
        "pairs.fit": filtered.kept,
    }
    assert dict(control.score) == {}
    assert paper.made[0].selection is None
    report = control.layers
    assert report is not None
    assert report.loss is not None
    assert report.spread is not None
    for layer in range(engine.info.n_layer):
        p_helpful, p_harmful = report.p_helpful[layer], report.p_harmful[layer]
        decision = "none"
        if p_harmful > p_helpful and p_harmful >= 0.5:
            decision = "remove"
        elif p_harmful <= p_helpful and p_helpful >= 0.5:
            decision = "add"
        assert control.edits.get(layer, LayerEdit()).decision == decision
        assert control.edits.get(layer, LayerEdit()).rank == (decision == "remove")


def test_paper_recipe_that_is_sure_of_no_layer_is_an_error(run: Run) -> None:
    with pytest.raises(NoGainError, match=r"threshold 1\.5.*lower --threshold"):
        run(replace(PAPER, method="mean", threshold=1.5))


def test_auto_writes_every_figure_that_led_to_the_choice(quick: Export, tmp_path: Path) -> None:
    control, (made,) = reloaded(quick, tmp_path), quick.made
    selection = made.selection
    assert selection is not None
    tried, chosen = [one.figures for one in selection.tried], selection.chosen.figures
    assert chosen.divergence is not None
    measured = [
        (-1.0, -1.0)
        if one.divergence is None or not one.divergence.is_whole
        else (one.divergence.per_token, one.divergence.after_first)
        for one in tried
    ]
    assert dict(control.score) == {
        "score": chosen.gain,
        "standard_error": chosen.standard_error,
        "onset": chosen.onset,
        "leak": chosen.leak,
        "kl": chosen.kl,
        "kl_after_first": chosen.divergence.after_first,
        "kl_budget": 1.0,
        "queries": selection.n_queries,
        "tried.candidate": tuple(str(one.candidate) for one in selection.tried),
        "tried.layers": tuple(span(one.candidate.layers) for one in selection.tried),
        "tried.score": tuple(one.gain for one in tried),
        "tried.onset": tuple(one.onset for one in tried),
        "tried.leak": tuple(one.leak for one in tried),
        "tried.kl": tuple(per_token for per_token, _ in measured),
        "tried.kl_after_first": tuple(after_first for _, after_first in measured),
        "baseline.name": tuple(one.name for one in made.baselines),
        "baseline.score": tuple(one.figures.gain for one in made.baselines),
        "baseline.kl": tuple(one.kl for one in made.baselines),
        "scope.name": ("all", "first:4", "first:1"),
        "scope.score": tuple(one.gain for one in made.scopes.values()),
        "scope.kl": tuple(one.kl for one in made.scopes.values()),
    }
    assert 0 <= float(str(control.score["kl"])) <= 1.0


def test_baselines_are_no_edit_the_persona_and_random_directions(quick: Export) -> None:
    none, persona, random = quick.made[0].baselines
    assert (none.name, none.figures.gain, none.kl) == ("no edit", 0.0, 0.0)
    assert persona.name == "helpful persona as a prompt"
    assert persona.figures.gain > 0
    assert random.name == "random directions of the same size"
    assert abs(random.figures.gain) < persona.figures.gain


def test_auto_writes_the_edits_of_its_choice(quick: Export, tmp_path: Path) -> None:
    control, selection = reloaded(quick, tmp_path), quick.made[0].selection
    assert selection is not None
    chosen = selection.chosen.candidate
    assert tuple(control.edits) == chosen.layers
    if chosen.added is None:
        assert {edit.decision for edit in control.edits.values()} == {chosen.operation}
    if chosen.operation != "add":
        assert {edit.rank for edit in control.edits.values()} == {chosen.source.rank}
    recipe = control.recipe
    names = ("method", "reading", "hook", "rank", "operation", "amount", "scope", "name")
    assert tuple(recipe[name] for name in names) == (
        chosen.source.method,
        chosen.source.reading,
        chosen.source.hook,
        chosen.source.rank,
        chosen.operation,
        chosen.amount,
        "generation",
        "auto",
    )
    assert int(str(recipe["pairs.fit"])) + int(str(recipe["pairs.selection"])) == recipe["pairs.kept"]


@pytest.mark.parametrize("scope", ["generation", "all"])
def test_gain_in_the_file_is_what_the_steered_engine_shows(
    scope: str, run: Run, engine: LlamaEngine, templates: Templates
) -> None:
    """Two ways to the same figure: the shared cache of the selection, and the engine that users run."""
    made = run(replace(QUICK, scope=Scope.parse(scope)))

    def logprobs(prompts: list[str], strength: float = 0.0) -> NDArray[np.float64]:
        return np.stack(list(engine.next_token_logprobs(prompts, strength))).astype(np.float64)

    held_out = made.made[0].held_out
    plain = [templates.plain_prompt(pair.query) for pair in held_out]
    asked = [answer_prompts(templates, pair) for pair in held_out]
    helpful = np.exp(logprobs([prompts[0] for prompts in asked]))
    harmful = np.exp(logprobs([prompts[1] for prompts in asked]))
    base = logprobs(plain)
    engine.set_edits(made.control.edits, scope)
    steered = logprobs(plain, strength=1.0)
    engine.set_edits({})
    gain = ((helpful - harmful) * (steered - base)).sum(axis=1).mean()
    # Keys and values in F16 are added up in another order here.
    assert made.control.score["score"] == pytest.approx(gain, rel=0.02)
    assert made.control.recipe["scope"] == scope


def net(made: Made) -> float:
    assert made.selection is not None
    assert made.selection.chosen.figures.net is not None
    return made.selection.chosen.figures.net


@pytest.mark.parametrize("layers", [(4,), (3,), (0,)], ids=str)
def test_narrower_scope_is_taken_only_where_it_is_better_by_a_margin(
    run: Run, layers: tuple[int, ...]
) -> None:
    """Held against a search of each scope alone; which one is the best of them depends on the machine."""
    job = replace(QUICK, layers=layers, method="svd-diff")

    def best(scope: Scope | None) -> Made | None:
        try:
            (made,) = run(replace(job, scope=scope)).made
        except NoGainError:
            return None
        assert set(made.scopes) == {"all", "generation", "first:4", "first:1"} - {made.recipe["scope"]}
        return made

    expected: Made | None = None
    for scope in SEARCHED:
        found = best(scope)
        if found is not None and (expected is None or net(found) > net(expected) + SCOPE_MARGIN):
            expected = found
    made = best(None)
    if made is None or expected is None:
        assert made is expected
        return
    assert made.selection is not None
    assert expected.selection is not None
    assert made.recipe["scope"] == expected.recipe["scope"]
    assert made.selection.chosen == expected.selection.chosen
    if made.recipe["scope"] == "generation":  # nothing has narrowed the search before it
        assert made.selection == expected.selection


def test_nothing_within_the_budget_is_an_error(run: Run) -> None:
    with pytest.raises(NoGainError, match="nothing makes this model safer"):
        run(replace(QUICK, kl_budget=1e-9))


def test_too_few_pairs_are_an_error(run: Run) -> None:
    with pytest.raises(QueryError, match=r"10 usable pairs are too few .* at least 16 queries"):
        run(queries=QUERIES[:10])


def test_only_the_layers_asked_for_are_edited(run: Run) -> None:
    made = run(replace(QUICK, layers=(1, 2)))
    assert set(made.control.edits) <= {1, 2}
    selection = made.made[0].selection
    assert selection is not None
    assert {layer for one in selection.tried for layer in one.candidate.layers} == {1, 2}
    assert set(run(replace(PAPER, method="mean", layers=(0,))).control.edits) == {0}


def test_samples_are_further_pairs_of_the_same_queries(
    run: Run, engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    made = run(replace(QUICK, samples=2, layers=(1, 2)))
    assert made.control.recipe["pairs.total"] == 2 * N_QUERIES
    held_out = made.made[0].held_out
    assert len({pair.query for pair in held_out}) == len(held_out)
    with WorkDirectory(folder) as work:
        job = Job(engine, templates, replace(QUICK, samples=2), work, SilentReporter(), engine, engine)
        pairs = self_generated_pairs(job, QUERIES)
    fitted = {pair.query for pair in pairs} - {pair.query for pair in held_out}
    assert int(str(made.control.recipe["pairs.fit"])) > len(fitted) * 0.9


def numbered(n_queries: int, samples: int = 1) -> list[PreferencePair]:
    return [
        PreferencePair(f"q{index}", f"good {sample}", "bad", sample=sample)
        for index in range(n_queries)
        for sample in range(samples)
    ]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("n_queries", [16, 17, 24, 120, 500])
def test_queries_are_split_into_two_parts_of_some_size(n_queries: int, samples: int) -> None:
    pairs = numbered(n_queries, samples)
    fit, held_out = split(pairs, seed=0)
    asked = [pair.query for pair in held_out]
    fitted = {pair.query for pair in fit}
    assert not fitted & set(asked)
    assert len(fitted) + len(asked) == n_queries
    assert len(fit) == samples * len(fitted)
    assert 8 <= len(asked) == len(set(asked)) <= 64
    assert len(fitted) >= 8
    assert all(pair.sample == 0 for pair in held_out)
    assert asked == sorted(asked, key=lambda query: int(query[1:]))
    assert held_out != split(pairs, seed=1)[1]
    assert held_out == split(pairs, seed=0)[1]


def test_several_samples_of_few_queries_are_too_few() -> None:
    with pytest.raises(QueryError, match="15 usable pairs are too few"):
        split(numbered(15, samples=4), seed=0)


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        (
            Settings(),
            {("prompt", "mlp"), ("response", "mlp"), ("response-mean", "mlp"), ("prompt", "residual")},
        ),
        (Settings(reading="response"), {("response", "mlp"), ("response", "residual")}),
        (Settings(hook="mlp"), {("prompt", "mlp"), ("response", "mlp"), ("response-mean", "mlp")}),
        (
            Settings(hook="residual"),
            {("prompt", "residual"), ("response", "residual"), ("response-mean", "residual")},
        ),
        (Settings(reading="response-mean", hook="residual"), {("response-mean", "residual")}),
    ],
)
def test_sources_are_every_method_at_the_places_asked_for(
    settings: Settings, places: set[tuple[str, str]]
) -> None:
    found = sources(settings)
    assert {(source.reading, source.hook) for source in found} == places
    for reading, hook in places:
        here = [source for source in found if (source.reading, source.hook) == (reading, hook)]
        assert {source.method for source in here} == set(METHODS)
        assert {source.rank for source in here if source.method == "svd-diff"} == {1, 2, 3}
        assert {source.rank for source in here if source.method == "ccs"} == {1}


def test_single_method_is_the_only_source() -> None:
    settings = Settings(method="logistic", reading="prompt", hook="mlp")
    assert sources(settings) == [Source("logistic", "prompt", 1)]


def test_sources_are_looked_for_where_the_architecture_can_be_read() -> None:
    every = sources(Settings())
    assert sources(Settings(), {"mlp"}) == [source for source in every if source.hook == "mlp"]
    assert sources(Settings(), {"residual"}) == [source for source in every if source.hook == "residual"]
    # What is asked for, or all of it where nothing can be read, is tried and fails.
    assert sources(Settings(hook="residual"), {"mlp"}) == sources(Settings(hook="residual"))
    assert sources(Settings(), set()) == every


class _Another:
    """An engine whose model is of an architecture with a norm behind the MLP."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine
        self.info = replace(engine.info, arch="gemma3")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_a_gap_before_a_norm_is_not_added_after_it(run: Run, engine: LlamaEngine, tmp_path: Path) -> None:
    selection = run(QUICK, tmp_path, target=_Another(engine)).made[0].selection

    assert selection is not None
    assert {scored.candidate.operation for scored in selection.tried} == {"remove"}


def test_a_gap_of_residual_streams_is_added_behind_a_norm_too(
    run: Run, engine: LlamaEngine, tmp_path: Path
) -> None:
    settings = replace(QUICK, hook="residual")
    selection = run(settings, tmp_path, target=_Another(engine)).made[0].selection

    assert selection is not None
    assert "add" in {scored.candidate.operation for scored in selection.tried}


def test_the_paper_recipe_refuses_to_add_before_a_norm_and_says_why(
    run: Run, engine: LlamaEngine, paper: Export, tmp_path: Path
) -> None:
    assert any(edit.add is not None for edit in paper.control.edits.values())
    with pytest.raises(SteeringError, match=r"gemma3 models have a norm behind the MLP.*--hook residual"):
        run(PAPER, tmp_path, target=_Another(engine))
