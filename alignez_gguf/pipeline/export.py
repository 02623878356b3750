"""The main job as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from alignez_gguf import __version__
from alignez_gguf.control.control_file import ControlFile, Field, LayerReport
from alignez_gguf.control.gguf_header import MAX_ARRAY
from alignez_gguf.control.layer_ranges import span
from alignez_gguf.control.scope import GENERATION
from alignez_gguf.engines.base import Engine, Generator
from alignez_gguf.errors import ControlFileError, QueryError
from alignez_gguf.pairs.filters import PairFilterReport
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pairs.query_hash import QUERY_HASHES, query_hash
from alignez_gguf.pipeline.aspects import Tradeoff, combine_within_budget
from alignez_gguf.pipeline.embeddings import ActivationSite
from alignez_gguf.pipeline.feasibility import require_contrast
from alignez_gguf.pipeline.job import EditScoringEngine, Job, Settings
from alignez_gguf.pipeline.recipes import RecipeResult, activation_sites, auto, paper
from alignez_gguf.pipeline.stages import given_pairs, open_scorer, self_generated_pairs, usable_pairs
from alignez_gguf.pipeline.verdicts import split
from alignez_gguf.progress import Reporter
from alignez_gguf.prompts.templates import SAFETY, Templates
from alignez_gguf.selection.scoring import EditScore
from alignez_gguf.storage.workdir import WorkDirectory


@dataclass(frozen=True)
class Export:
    """A finished job.

    Attributes:
        control: the control file.
        filtered: which pairs were of use, for each aspect.
        results: the edits of each aspect.
        tradeoffs: what the aspects gain alone and together; empty for a single one.
    """

    control: ControlFile
    filtered: Sequence[PairFilterReport]
    results: Sequence[RecipeResult]
    tradeoffs: Sequence[Tradeoff] = ()


def export(
    engine: Engine,
    queries: Sequence[str],
    templates: Templates,
    settings: Settings,
    work: WorkDirectory,
    reporter: Reporter,
    *,
    target: EditScoringEngine,
    generator: Generator | None = None,
    given: Sequence[PreferencePair] = (),
) -> Export:
    """Make the control file of a model.

    Args:
        engine: runs the model whose embeddings are read.
        queries: unlabelled, without repetitions; answered by the model itself. May be empty if there are
            `given` pairs.
        templates: how the model is asked.
        settings: what else decides the result.
        work: keeps what is done for a later run.
        reporter: told of the progress.
        target: runs the model that the file is for; the same engine, or one of another file of the model.
        generator: writes the pairs; default: `engine`.
        given: pairs that others wrote, of the only aspect.

    Raises:
        QueryError: a query is too long, or too few pairs are left.
        ControlFileError: `engine` and `target` run models of different shapes.
        TemplateError: the templates lack an aspect.
        NoGainError: the personas show no contrast to amplify, or nothing makes the model safer.
    """
    _check_same_shape(engine, target)
    if given and len(settings.aspects) > 1:
        raise QueryError("given pairs belong to one aspect; export one aspect at a time, or leave them out")
    if len(settings.aspects) > 1 and settings.scope is None:
        settings = replace(settings, scope=GENERATION)  # one file has one scope
    if len(settings.aspects) > 1:
        settings = replace(settings, gate=False)  # what is harmful is not when to be helpful
    jobs = [
        Job(
            engine,
            templates.for_aspect(aspect.name),
            replace(settings, aspects=(aspect,)),
            work,
            reporter,
            target,
            generator or engine,
        )
        for aspect in settings.aspects
    ]
    recipe = paper if settings.recipe == "paper" else auto
    filtered, made = [], []
    for job in jobs:
        if len(jobs) > 1:
            reporter.note(f"aspect: {job.settings.aspects[0].name}")
        if queries and job.settings.aspects[0].name == SAFETY:
            require_contrast(job)
        pairs, report = _some_usable_pairs(
            job, self_generated_pairs(job, queries), given_pairs(job, given), activation_sites(job)
        )
        filtered.append(report)
        made.append(recipe(job, pairs))
    edits, scale = made[0].edits, 1.0
    tradeoffs: Sequence[Tradeoff] = ()
    if len(jobs) > 1:
        edits, tradeoffs, scale = combine_within_budget(jobs, made)
    seen_by_gate = [] if made[0].gate is None else [query for twin in templates.twins for query in twin]
    control = ControlFile(
        model=target.info,
        edits=edits,
        recipe={
            **_per_aspect(jobs, [one.recipe for one in made]),
            **({"scope": str(settings.scope)} if len(jobs) > 1 else {}),
            "name": settings.recipe,
            "seed": settings.seed,
            "aspects": tuple(aspect.name for aspect in settings.aspects),
            "aspect_weights": tuple(scale * aspect.weight for aspect in settings.aspects),
            "template_version": templates.version,
            "framing": templates.framing,
            "package_version": __version__,
            **{
                f"pairs.{field.name}": sum(getattr(report, field.name) for report in filtered)
                for field in fields(PairFilterReport)
            },
            "pairs.given": len(given),
            **_query_hashes([*queries, *(pair.query for pair in given), *seen_by_gate]),
        },
        layers=LayerReport.of(made[0].directions),
        score={
            **_per_aspect(jobs, [_score(one) for one in made]),
            **{f"aspects.{name}": values for name, values in _tradeoff_columns(tradeoffs).items()},
        },
        gate=made[0].gate,
    )
    return Export(control, filtered, made, tradeoffs)


def score_control(
    control: ControlFile,
    engine: EditScoringEngine,
    queries: Sequence[str],
    templates: Templates,
    settings: Settings,
    work: WorkDirectory,
    reporter: Reporter,
    *,
    generator: Generator | None = None,
    given: Sequence[PreferencePair] = (),
) -> tuple[EditScore, int]:
    """The figures of an existing control file on a model in the only aspect, and over how many queries.

    Those are the queries on which an export from the same ones, with the same seed, chooses and confirms.

    Raises:
        ControlFileError: the file is not for this model.
        QueryError: a query is too long, or too few pairs are of use.
    """
    control.check_fits(engine.info)
    job = Job(
        engine,
        templates.for_aspect(settings.aspects[0].name),
        settings,
        work,
        reporter,
        engine,
        generator or engine,
    )
    pairs, _ = _some_usable_pairs(job, self_generated_pairs(job, queries), given_pairs(job, given))
    _, choice, confirmation = split(pairs, settings.seed)
    with open_scorer(job, [*choice, *confirmation], control.gate) as scorer:
        scope = settings.scope or control.scope
        return scorer.score(control.edits, scope=scope), scorer.n_queries


def _some_usable_pairs(
    job: Job,
    generated: Sequence[PreferencePair],
    given: Sequence[PreferencePair],
    at: Sequence[ActivationSite] = (),
) -> tuple[list[PreferencePair], PairFilterReport]:
    """The usable pairs; see `usable_pairs`. Raises `QueryError` where there is none."""
    pairs, report = usable_pairs(job, generated, given, at)
    if not pairs:
        raise QueryError(
            f"{report}; give pairs whose two answers differ, or queries that the personas answer differently"
        )
    return pairs, report


def _query_hashes(queries: Sequence[str]) -> dict[str, Field]:
    """What tells an evaluation which queries were seen; nothing where a file cannot hold it all."""
    hashes = tuple(dict.fromkeys(map(query_hash, queries)))
    return {QUERY_HASHES: hashes} if len(hashes) <= MAX_ARRAY else {}


def _check_same_shape(engine: Engine, target: EditScoringEngine) -> None:
    mine, other = engine.info, target.info
    if (mine.arch, mine.n_layer, mine.n_embd) != (other.arch, other.n_layer, other.n_embd):
        raise ControlFileError(
            f"the directions would come from {mine}, but the file is for {other}; give two files of one model"
        )


def _per_aspect(jobs: Sequence[Job], fields: Sequence[Mapping[str, Field]]) -> dict[str, Field]:
    """Fields of a single aspect as they are, those of several under their names."""
    if len(jobs) == 1:
        return dict(fields[0])
    return {
        f"{job.settings.aspects[0].name}.{key}": value
        for job, one in zip(jobs, fields, strict=True)
        for key, value in one.items()
    }


def _score(made: RecipeResult) -> dict[str, Field]:
    """The figures of the confirmation, and what the choice saw; -1 where a divergence was not measured."""
    found: dict[str, Field] = {}
    if made.confirmation is not None:
        confirmation = made.confirmation
        score = confirmation.score
        found |= {
            "score": score.gain,
            "standard_error": score.standard_error,
            "share": confirmation.share,
            "kl": _divergence(score),
            "kl_budget": float(confirmation.budget),
            "queries": len(score.gains),
            "confirmed": not confirmation.reason_unconfirmed,
            "baseline.name": tuple(baseline.name for baseline in confirmation.baselines),
            "baseline.score": tuple(baseline.score.gain for baseline in confirmation.baselines),
            "baseline.kl": tuple(_divergence(baseline.score) for baseline in confirmation.baselines),
            "said.declined": sum(confirmation.harmful),
        }
        for name, counts in (("base", confirmation.base), ("steered", confirmation.steered)):
            if counts is not None:
                found |= {
                    f"said.{name}.declines_declined": confirmation.refusals(counts, harmful=True),
                    f"said.{name}.declines_answered": confirmation.refusals(counts, harmful=False),
                    f"said.{name}.broken": counts.broken,
                }
    if made.selection is not None:
        selection = made.selection
        tried = [scored.score for scored in selection.tried]
        found |= {
            "choice.score": selection.chosen.score.gain,
            "choice.kl": _divergence(selection.chosen.score),
            "choice.queries": selection.n_queries,
            "tried.candidate": tuple(str(scored.candidate) for scored in selection.tried),
            "tried.layers": tuple(span(scored.candidate.layers) for scored in selection.tried),
            "tried.queries": tuple(len(score.gains) for score in tried),
            "tried.score": tuple(score.gain for score in tried),
            "tried.kl": tuple(map(_divergence, tried)),
        }
    return found


def _divergence(score: EditScore) -> float:
    return -1.0 if score.kl is None else score.kl


def _tradeoff_columns(tradeoffs: Sequence[Tradeoff]) -> dict[str, Field]:
    if not tradeoffs:
        return {}
    return {
        "name": tuple(one.aspect.name for one in tradeoffs),
        "score_alone": tuple(one.alone.gain for one in tradeoffs),
        "score_together": tuple(one.together.gain for one in tradeoffs),
        "kl_alone": tuple(one.alone.kl or 0.0 for one in tradeoffs),
        "kl_together": tuple(one.together.kl or 0.0 for one in tradeoffs),
    }
