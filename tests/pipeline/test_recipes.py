"""What the recipes make of the pairs, and what they write of it into the control file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf import __version__
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.layer_ranges import span
from alignez_gguf.control.scope import Scope
from alignez_gguf.directions.base import Directions
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import NoGainError, QueryError
from alignez_gguf.pipeline import Export, Job, Settings, export, recipes, self_generated_pairs
from alignez_gguf.pipeline.choice import FittedDirections
from alignez_gguf.pipeline.embeddings import ActivationSite
from alignez_gguf.pipeline.recipes import SEARCHED_METHODS, sources
from alignez_gguf.pipeline.verdicts import alternating
from alignez_gguf.progress import SilentReporter
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.readout import Hook
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.context import Context
from alignez_gguf.selection.candidates import Candidate, Source
from alignez_gguf.selection.logprobs import log_softmax
from alignez_gguf.selection.scoring import ANSWER_TOKENS
from alignez_gguf.storage.workdir import WorkDirectory
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
        "pairs.fit": filtered.kept - len(paper.results[0].held_out),
        "pairs.confirmation": len(paper.results[0].held_out),
    }
    assert paper.results[0].selection is None
    confirmation = paper.results[0].confirmation
    assert confirmation is not None
    assert control.score["score"] == confirmation.score.gain
    assert control.score["confirmed"] == (not confirmation.reason_unconfirmed)
    assert "choice.score" not in control.score
    report = control.layers
    assert report is not None
    assert report.loss is not None
    assert report.spread is not None
    assert report.flipped is not None
    for layer in range(engine.info.n_layer):
        p_helpful, p_harmful = report.p_helpful[layer], report.p_harmful[layer]
        decision = "none"
        if p_harmful > p_helpful and p_harmful >= 0.5:
            decision = "remove"
        elif p_harmful <= p_helpful and p_helpful >= 0.5:
            decision = "add"
        assert control.edits.get(layer, LayerEdit()).decision == decision
        assert control.edits.get(layer, LayerEdit()).rank == (decision == "remove")


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_paper_recipe_says_where_its_probes_are_at_chance_and_disagree(job: Job) -> None:
    found = Directions(
        "ccs",
        np.zeros((4, 1, 8), np.float32),
        *np.zeros((2, 4), np.float32),
        accuracy=np.array([0.5, 0.59, 0.9, 0.4], np.float32),
        flipped=np.array([0.0, 0.5, 0.2, 0.3], np.float32),
    )
    chance, disagreeing = recipes._about_probes(found, 50, (0, 1, 2))
    assert chance.startswith("at 1 of 3 edited layers (0) the probe tells held-out answers apart no better")
    assert "accuracy up to 0.58" in chance
    assert disagreeing.startswith("at 1 of 3 edited layers (1) 30% or more of the restarts")
    assert list(recipes._about_probes(found, 50, (2,))) == []


def test_paper_recipe_measures_nothing_on_too_few_queries(
    engine: LlamaEngine, templates: Templates, tmp_path: Path
) -> None:
    reporter = Notes()
    with WorkDirectory(tmp_path / "w") as work:
        made = export(engine, QUERIES[:16], templates, PAPER, work, reporter, target=engine)
    assert made.results[0].confirmation is None
    assert made.control.recipe["pairs.fit"] == made.control.recipe["pairs.kept"]
    assert any("too few to measure" in note for note in reporter.notes)


def test_paper_recipe_that_is_sure_of_no_layer_is_an_error(run: Run) -> None:
    with pytest.raises(NoGainError, match=r"threshold 1\.5.*lower --threshold"):
        run(replace(PAPER, method="mean", threshold=1.5))


def test_auto_writes_the_confirmed_figures_and_everything_that_was_tried(
    quick: Export, tmp_path: Path
) -> None:
    control, (made,) = reloaded(quick, tmp_path), quick.results
    selection, confirmation = made.selection, made.confirmation
    assert selection is not None
    assert confirmation is not None
    assert confirmation.base is not None
    assert confirmation.steered is not None
    figures, chosen = confirmation.score, selection.chosen.score
    tried = [one.score for one in selection.tried]
    assert dict(control.score) == {
        "score": figures.gain,
        "standard_error": figures.standard_error,
        "share": confirmation.share,
        "kl": figures.kl,
        "kl_budget": 1.0,
        "queries": len(made.held_out),
        "confirmed": True,
        "choice.score": chosen.gain,
        "choice.kl": chosen.kl,
        "choice.queries": selection.n_queries,
        "tried.candidate": tuple(str(one.candidate) for one in selection.tried),
        "tried.layers": tuple(span(one.candidate.layers) for one in selection.tried),
        "tried.queries": tuple(len(one.gains) for one in tried),
        "tried.score": tuple(one.gain for one in tried),
        "tried.kl": tuple(-1.0 if one.kl is None else one.kl for one in tried),
        "baseline.name": tuple(one.name for one in confirmation.baselines),
        "baseline.score": tuple(one.score.gain for one in confirmation.baselines),
        "baseline.kl": tuple(one.score.kl for one in confirmation.baselines),
        "said.declined": sum(figures.declined),
        "said.base.declines_declined": confirmation.refusals(confirmation.base, harmful=True),
        "said.base.declines_answered": confirmation.refusals(confirmation.base, harmful=False),
        "said.base.broken": confirmation.base.broken,
        "said.steered.declines_declined": confirmation.refusals(confirmation.steered, harmful=True),
        "said.steered.declines_answered": confirmation.refusals(confirmation.steered, harmful=False),
        "said.steered.broken": confirmation.steered.broken,
    }


def test_baselines_are_no_edit_the_persona_and_random_directions(quick: Export) -> None:
    confirmation = quick.results[0].confirmation
    assert confirmation is not None
    none, persona, random = confirmation.baselines
    assert (none.name, none.score.gain, none.score.kl) == ("no edit", 0.0, 0.0)
    assert persona.name == "safety-first persona as a prompt"
    assert persona.score.gain > 0
    assert random.name == "random directions of the same size"
    assert random.score.gain < confirmation.score.gain
    assert confirmation.share == confirmation.score.gain / persona.score.gain


def test_auto_writes_the_edits_of_its_choice(quick: Export, tmp_path: Path) -> None:
    control, selection = reloaded(quick, tmp_path), quick.results[0].selection
    assert selection is not None
    chosen = selection.chosen.candidate
    assert tuple(control.edits) == chosen.layers
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
    parts = [int(str(recipe[f"pairs.{part}"])) for part in ("fit", "selection", "confirmation")]
    assert sum(parts) == recipe["pairs.kept"]


@pytest.mark.parametrize("scope", ["generation", "all"])
def test_gain_in_the_file_is_what_the_steered_engine_shows(
    scope: str, run: Run, engine: LlamaEngine, templates: Templates
) -> None:
    """Two ways to the same figure: the shared cache of the selection, and the engine that users run."""
    made = run(replace(QUICK, scope=Scope.parse(scope)))

    def logprobs(strength: float) -> NDArray[np.float64]:
        """Of the answers of the persona, token by token as they would be sampled."""
        found = []
        for pair in alternating(made.results[0].held_out)[:4]:
            prompt = templates.plain_prompt(pair.query)
            tokens = engine.model.tokenize(prompt + templates.continued(pair.helpful))
            n_prompt = len(engine.model.tokenize(prompt))
            answer = tokens[n_prompt:][:ANSWER_TOKENS]
            total = 0.0
            for index, token in enumerate(answer):
                total += float(following(tokens[: n_prompt + index], n_prompt, strength)[token])
            found.append(total)
        return np.array(found)

    def following(tokens: list[int], n_prompt: int, strength: float) -> NDArray[np.float64]:
        context = Context(engine.model, n_ctx=512, n_threads=1, edits=made.control.edits)
        with context:
            first, end = Scope.parse(scope).positions(n_prompt)
            bindings.set_strength(context.pointer, strength, sequence=0, first=first, end=end)
            outputs = [False] * (len(tokens) - 1) + [True]
            context.decode(tokens, range(len(tokens)), [0] * len(tokens), outputs)
            return log_softmax(context.logits(len(tokens) - 1)).astype(np.float64)

    confirmation = made.results[0].confirmation
    assert confirmation is not None
    gains = logprobs(1.0) - logprobs(0.0)
    # Keys and values in F16 are added up in another order here.
    np.testing.assert_allclose(confirmation.score.gains[:4], gains, rtol=0.02, atol=0.05)
    assert made.control.recipe["scope"] == scope


def test_nothing_within_the_budget_is_an_error(run: Run) -> None:
    # What an edit costs is estimated, and may seem to be nothing on a few queries, but not on others too.
    with pytest.raises(NoGainError, match=r"within 1e-09 nat per token|twice the budget of 1e-09"):
        run(replace(QUICK, kl_budget=1e-9))


def test_too_few_pairs_are_an_error(run: Run) -> None:
    with pytest.raises(QueryError, match=r"10 usable pairs are too few .* at least 20 queries"):
        run(queries=QUERIES[:10])


def test_only_the_layers_asked_for_are_edited(run: Run) -> None:
    made = run(replace(QUICK, layers=(1, 2)))
    assert set(made.control.edits) <= {1, 2}
    selection = made.results[0].selection
    assert selection is not None
    assert {layer for one in selection.tried for layer in one.candidate.layers} == {1, 2}
    assert set(run(replace(PAPER, method="mean", layers=(0,))).control.edits) == {0}


def test_samples_are_further_pairs_of_the_same_queries(
    run: Run, engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    made = run(replace(QUICK, samples=2, layers=(1, 2)))
    assert made.control.recipe["pairs.total"] == 2 * N_QUERIES
    held_out = made.results[0].held_out
    assert len({pair.query for pair in held_out}) == len(held_out)
    recipe = made.control.recipe
    with WorkDirectory(folder) as work:
        job = Job(engine, templates, replace(QUICK, samples=2), work, SilentReporter(), engine, engine)
        pairs = self_generated_pairs(job, QUERIES)
    n_fitted = len({pair.query for pair in pairs}) - sum(
        int(str(recipe[f"pairs.{part}"])) for part in ("selection", "confirmation")
    )
    assert int(str(recipe["pairs.fit"])) > n_fitted * 1.5


VERDICTS = {("refusal", "mlp"), ("verdict", "mlp")}
PERSONAS = {("prompt", "mlp"), ("response", "mlp")}
MEAN = ("response-mean", "mlp")


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        (Settings(), {*VERDICTS, *PERSONAS, ("prompt", "residual")}),
        (Settings(reading="response"), {("response", "mlp"), ("response", "residual")}),
        (Settings(reading="verdict"), {("verdict", "mlp")}),
        (Settings(hook="mlp"), {*VERDICTS, *PERSONAS, MEAN}),
        (
            Settings(hook="residual"),
            {(reading, "residual") for reading, _ in {*VERDICTS, *PERSONAS, MEAN}},
        ),
        (Settings(reading="response-mean", hook="residual"), {("response-mean", "residual")}),
        (Settings(reading="refusal", hook="residual"), {("refusal", "residual")}),
    ],
)
def test_sources_are_every_method_at_the_places_asked_for(
    settings: Settings, places: set[tuple[str, str]]
) -> None:
    found = sources(settings)
    assert {(source.reading, source.hook) for source in found} == places
    for reading, hook in places:
        here = [source for source in found if (source.reading, source.hook) == (reading, hook)]
        if reading in ("verdict", "refusal"):
            assert [source.method for source in here] == ["mean"]
        else:
            assert {source.method for source in here} == set(SEARCHED_METHODS)
            assert {source.rank for source in here} == {1}


def test_single_method_is_the_only_source() -> None:
    settings = Settings(method="logistic", reading="prompt", hook="mlp")
    assert sources(settings) == [Source("logistic", "prompt", 1)]
    assert sources(Settings(method="ccs", reading="verdict")) == [Source("ccs", "verdict", 1)]


@pytest.mark.parametrize("hook", [None, "mlp", "residual"])
def test_verdicts_are_read_at_the_mlp_unless_another_hook_is_asked_for(hook: Hook | None) -> None:
    found = sources(Settings(hook=hook))
    verdicts = {source.hook for source in found if source.reading in ("verdict", "refusal")}
    assert verdicts == {hook or "mlp"}


def test_verdicts_are_read_only_if_there_are_some() -> None:
    found = sources(Settings(), missing=["refusal"])
    assert {source.reading for source in found} == {"verdict", "prompt", "response"}


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


@pytest.mark.parametrize(("hook", "has_post_norm"), [("mlp", True), ("mlp", False), ("residual", True)])
def test_a_gap_before_a_norm_is_added_before_it(hook: Hook, has_post_norm: bool) -> None:
    gap = np.array([[3.0, 4.0]], np.float32)
    directions = SimpleNamespace(vectors=gap[:, None] / 5)
    fitted = {
        ("mean", ActivationSite("refusal", hook)): SimpleNamespace(directions=directions, class_gap=gap)
    }
    edit = FittedDirections(fitted, has_post_norm).edits(  # type: ignore[arg-type]
        Candidate(Source("mean", "refusal", 1, hook), "add", 0.5, (0,))
    )[0]
    at_mlp, at_block = (edit.bias, edit.add) if hook == "mlp" and has_post_norm else (edit.add, edit.bias)
    assert at_block is None
    np.testing.assert_allclose(at_mlp, [1.5, 2.0], rtol=1e-6)


def test_the_paper_recipe_adds_before_a_norm_too(run: Run, engine: LlamaEngine, tmp_path: Path) -> None:
    edits = run(PAPER, tmp_path, target=_Another(engine)).control.edits.values()
    assert any(edit.bias is not None for edit in edits)
    assert all(edit.add is None for edit in edits)
