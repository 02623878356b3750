"""The main job: from a model and queries to a control file.

queries -> pairs -> activations -> directions -> edits -> control file. Each stage leaves its result in a work
directory, so that an interrupted job goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from alignez_gguf import __version__, directions
from alignez_gguf.activations import Activations, ReadingPosition, class_gap
from alignez_gguf.control import ControlFile, Field, LayerReport
from alignez_gguf.directions import Directions
from alignez_gguf.edits import Edits, paper_edits, span_edits
from alignez_gguf.engines import Engine, GenerationRequest, Sampling
from alignez_gguf.errors import NoGainError, QueryError
from alignez_gguf.generation import (
    answer_prompts,
    answered_prompts,
    default_sampling,
    generate_pairs,
    request_seed,
)
from alignez_gguf.pairs import PairFilterReport, PairStore, PreferencePair, filter_pairs
from alignez_gguf.progress import Reporter
from alignez_gguf.prompts import Templates
from alignez_gguf.selection import (
    ANSWER_TOKENS,
    DEFAULT_BUDGET,
    Candidate,
    Scored,
    Search,
    Selection,
    Source,
    SteeredModel,
    span,
)
from alignez_gguf.workdir import WorkDirectory

Recipe = Literal["auto", "paper"]

SVD_RANKS = (1, 2, 3)
"""Ranks of `svd-diff` that the search tries."""

_MAX_SELECTION = 64
"""Queries that the selection looks at, at most: each costs a token per candidate."""
_SELECTION_SHARE = 0.4
_MIN_SELECTION = 8


@dataclass(frozen=True)
class Settings:
    """What decides a control file, besides the model and the queries.

    Attributes:
        recipe: `auto` chooses without labels; `paper` is AlignEZ to the letter.
        seed: of every draw.
        method: only this one; `None` tries all.
        reading: only this position; `None` tries both.
        layers: only these may be edited; `None` is all.
        threshold: of the paper's decision rule.
        kl_budget: nat per token, for `auto`.
        max_tokens: of an answer, at most.
    """

    recipe: Recipe = "auto"
    seed: int = 0
    method: str | None = None
    reading: ReadingPosition | None = None
    layers: tuple[int, ...] | None = None
    threshold: float = 0.5
    kl_budget: float = DEFAULT_BUDGET
    max_tokens: int | None = None


@dataclass(frozen=True)
class Export:
    """A finished job."""

    control: ControlFile
    filtered: PairFilterReport
    selection: Selection | None


class SteerableEngine(Engine, Protocol):
    """An engine that can also measure edits of its model."""

    def steered_prompts(
        self, prompts: Sequence[str], base_answers: Sequence[str], helpful_answers: Sequence[str]
    ) -> AbstractContextManager[SteeredModel]:
        """The model over plain prompts, its own answers and the helpful persona's, for `Search`.

        Raises:
            RuntimeUnavailableError: the runtime cannot steer.
        """
        ...


def export(
    engine: SteerableEngine,
    queries: Sequence[str],
    templates: Templates,
    settings: Settings,
    work: WorkDirectory,
    reporter: Reporter,
) -> Export:
    """Make the control file of a model.

    Args:
        engine: runs the model.
        queries: unlabelled, without repetitions.
        templates: how the model is asked.
        settings: what else decides the result.
        work: keeps pairs and activations for a later run.
        reporter: told of the progress.

    Raises:
        QueryError: a query is too long, or too few pairs are left.
        NoGainError: nothing makes the model safer.
    """
    pairs = self_generated_pairs(engine, queries, templates, settings, work, reporter)
    usable, filtered = filter_pairs(pairs)
    reporter.note(_filter_note(filtered))
    recipe = _paper if settings.recipe == "paper" else _auto
    made = recipe(engine, usable, templates, settings, work, reporter)
    control = ControlFile(
        model=engine.info,
        edits=made.edits,
        recipe={
            **made.recipe,
            "name": settings.recipe,
            "seed": settings.seed,
            "template_version": templates.version,
            "package_version": __version__,
            "pairs.total": filtered.total,
            "pairs.kept": filtered.kept,
        },
        layers=LayerReport.of(made.directions),
        score=_score(made.selection) if made.selection else {},
    )
    return Export(control, filtered, made.selection)


def self_generated_pairs(
    engine: Engine,
    queries: Sequence[str],
    templates: Templates,
    settings: Settings,
    work: WorkDirectory,
    reporter: Reporter,
) -> list[PreferencePair]:
    """The first stage: pairs for all queries, in their order; those in the work directory are reused."""
    sampling = default_sampling(templates)
    if settings.max_tokens is not None:
        sampling = replace(sampling, max_tokens=settings.max_tokens)
    path = work.part(
        "pairs", model=engine.info, templates=templates, sampling=sampling, seed=settings.seed
    ).with_suffix(".jsonl")
    with PairStore(path) as store, reporter.stage("generating pairs", len(queries)) as advance:
        return generate_pairs(
            engine, queries, templates, store, sampling=sampling, seed=settings.seed, advance=advance
        )


def read_activations(
    engine: Engine,
    pairs: Sequence[PreferencePair],
    reading: ReadingPosition,
    templates: Templates,
    work: WorkDirectory,
    reporter: Reporter,
) -> Activations:
    """The second stage: MLP outputs of all layers for both sides of every pair, in their order."""
    texts_of = {"response": answered_prompts, "prompt": answer_prompts}[reading]
    folder = work.part(
        "activations", model=engine.info, templates=templates, pairs=list(pairs), reading=reading
    )
    activations = Activations(engine.info.n_layer, len(pairs), engine.info.n_embd, folder)
    missing = [index for index in range(len(pairs)) if not activations.done[index]]
    texts = [text for index in missing for text in texts_of(templates, pairs[index])]
    with reporter.stage(f"reading activations ({reading})", len(pairs)) as advance:
        advance(len(pairs) - len(missing))
        outputs = engine.mlp_outputs(texts)
        for index, helpful, harmful in zip(missing, outputs, outputs, strict=True):
            activations.write(index, helpful, harmful)
            advance(1)
    return activations


@dataclass(frozen=True)
class _Made:
    edits: Edits
    directions: Directions
    recipe: Mapping[str, Field]
    selection: Selection | None = None


def _paper(
    engine: SteerableEngine,
    pairs: Sequence[PreferencePair],
    templates: Templates,
    settings: Settings,
    work: WorkDirectory,
    reporter: Reporter,
) -> _Made:
    """AlignEZ to the letter: CCS at the last token of the response, the decision rule, every layer."""
    method, reading = settings.method or "ccs", settings.reading or "response"
    activations = read_activations(engine, pairs, reading, templates, work, reporter)
    with reporter.stage(f"fitting directions ({method})", None):
        fitted = directions.fit(method, activations.helpful, activations.harmful, seed=settings.seed)
    edits = paper_edits(fitted, activations.class_gap(), threshold=settings.threshold, layers=settings.layers)
    if not edits:
        raise NoGainError(
            f"no layer's probe is sure enough (threshold {settings.threshold:g}); give more queries, "
            "lower --threshold, or use --recipe auto"
        )
    recipe: dict[str, Field] = {
        "method": method,
        "reading": reading,
        "rank": 1,
        "threshold": settings.threshold,
        "pairs.fit": len(pairs),
    }
    return _Made(edits, fitted, recipe)


def _auto(
    engine: SteerableEngine,
    pairs: Sequence[PreferencePair],
    templates: Templates,
    settings: Settings,
    work: WorkDirectory,
    reporter: Reporter,
) -> _Made:
    """Fit on a part of the pairs, choose on the queries of the others."""
    fit_indices, selection_indices = _split(len(pairs), settings.seed)
    sources = _sources(settings)
    fits: dict[tuple[str, ReadingPosition], _Fit] = {}
    for reading in dict.fromkeys(source.reading for source in sources):
        activations = read_activations(engine, pairs, reading, templates, work, reporter)
        helpful = [layer[fit_indices] for layer in activations.helpful]
        harmful = [layer[fit_indices] for layer in activations.harmful]
        gap = class_gap(helpful, harmful)
        for method in dict.fromkeys(source.method for source in sources):
            rank = max(source.rank for source in sources if source.method == method)
            with reporter.stage(f"fitting directions ({method}, {reading})", None):
                fitted = directions.fit(method, helpful, harmful, rank=rank, seed=settings.seed)
            fits[method, reading] = _Fit(fitted, gap)

    def edits_of(candidate: Candidate) -> Edits:
        source = candidate.source
        fit = fits[source.method, source.reading]
        return span_edits(
            fit.directions.vectors[:, : source.rank],
            fit.class_gap,
            remove=candidate.operation != "add",
            amount=candidate.amount,
            layers=candidate.layers,
        )

    chosen_pairs = [pairs[index] for index in selection_indices]
    selection = _select(engine, chosen_pairs, templates, settings, sources, edits_of, reporter)
    best = selection.chosen.candidate
    recipe: dict[str, Field] = {
        "method": best.source.method,
        "reading": best.source.reading,
        "rank": best.source.rank,
        "operation": best.operation,
        "amount": float(best.amount),
        "pairs.fit": len(fit_indices),
        "pairs.selection": len(selection_indices),
    }
    fitted = fits[best.source.method, best.source.reading].directions
    return _Made(edits_of(best), fitted, recipe, selection)


@dataclass(frozen=True)
class _Fit:
    directions: Directions
    class_gap: NDArray[np.float32]


def _select(
    engine: SteerableEngine,
    pairs: Sequence[PreferencePair],
    templates: Templates,
    settings: Settings,
    sources: Sequence[Source],
    edits_of: Callable[[Candidate], Edits],
    reporter: Reporter,
) -> Selection:
    asked = [prompt for pair in pairs for prompt in answer_prompts(templates, pair)]
    plain = [templates.plain_prompt(pair.query) for pair in pairs]
    with reporter.stage("asking the personas", len(asked)) as advance:
        personas = []
        for logprobs in engine.next_token_logprobs(asked):
            personas.append(np.exp(logprobs))
            advance(1)
    base = _base_answers(engine, pairs, templates, settings, reporter)
    helpful = [f" {pair.helpful}" for pair in pairs]
    layers = settings.layers or tuple(range(engine.info.n_layer))
    with (
        engine.steered_prompts(plain, base, helpful) as model,
        reporter.stage("trying edits", None) as advance,
    ):
        search = Search(
            model,
            edits_of,
            p_helpful=np.stack(personas[0::2]),
            p_harmful=np.stack(personas[1::2]),
            budget=settings.kl_budget,
            advance=lambda _: advance(1),
        )
        return search.run(sources, layers)


def _base_answers(
    engine: Engine,
    pairs: Sequence[PreferencePair],
    templates: Templates,
    settings: Settings,
    reporter: Reporter,
) -> list[str]:
    """The base model's own answers, along which fluency is guarded."""
    sampling = Sampling(max_tokens=ANSWER_TOKENS, stop=templates.stop)
    requests = [
        GenerationRequest(
            templates.plain_prompt(pair.query), request_seed(settings.seed, pair.query, "plain")
        )
        for pair in pairs
    ]
    answers = [""] * len(requests)
    with reporter.stage("answering plainly", len(requests)) as advance:
        for index, completion in engine.generate(requests, sampling):
            answers[index] = completion.text
            advance(1)
    return answers


def _sources(settings: Settings) -> list[Source]:
    chosen = directions.METHODS if settings.method is None else (settings.method,)
    readings: tuple[ReadingPosition, ...] = ("prompt", "response")
    if settings.reading is not None:
        readings = (settings.reading,)
    return [
        Source(method, reading, rank)
        for reading in readings
        for method in chosen
        for rank in (SVD_RANKS if method == "svd-diff" else (1,))
    ]


def _split(n_pairs: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the pairs to fit on and of those to choose on."""
    n_selection = min(max(round(n_pairs * _SELECTION_SHARE), _MIN_SELECTION), _MAX_SELECTION)
    if n_pairs < n_selection + _MIN_SELECTION:
        raise QueryError(
            f"{n_pairs} usable pairs are too few to fit and to choose on; give at least "
            f"{2 * _MIN_SELECTION} queries that the personas answer differently"
        )
    order = np.random.default_rng(seed).permutation(n_pairs)
    return np.sort(order[n_selection:]), np.sort(order[:n_selection])


def _score(selection: Selection) -> dict[str, Field]:
    """What the selection saw, for the control file; -1 where a divergence was not measured."""
    chosen = selection.chosen

    def measured(scored: Scored) -> tuple[float, float]:
        found = scored.divergence
        return (-1.0, -1.0) if found is None else (found.per_token, found.after_first)

    kl, after_first = measured(chosen)
    return {
        "score": chosen.gain,
        "standard_error": chosen.standard_error,
        "leak": chosen.leak,
        "kl": kl,
        "kl_after_first": after_first,
        "kl_budget": float(selection.budget),
        "queries": selection.n_queries,
        "tried.candidate": tuple(str(scored.candidate) for scored in selection.tried),
        "tried.layers": tuple(span(scored.candidate.layers) for scored in selection.tried),
        "tried.score": tuple(scored.gain for scored in selection.tried),
        "tried.leak": tuple(scored.leak for scored in selection.tried),
        "tried.kl": tuple(measured(scored)[0] for scored in selection.tried),
        "tried.kl_after_first": tuple(measured(scored)[1] for scored in selection.tried),
    }


def _filter_note(report: PairFilterReport) -> str:
    left_out = ", ".join(
        f"{count} {name}"
        for name, count in (
            ("empty", report.empty),
            ("identical", report.identical),
            ("nearly identical", report.near_identical),
        )
        if count
    )
    return f"{report.kept} of {report.total} pairs are of use" + (
        f" (left out: {left_out})" if left_out else ""
    )
