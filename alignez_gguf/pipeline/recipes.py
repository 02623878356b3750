"""How directions become edits: AlignEZ to the letter, or the label-free choice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignez_gguf import directions
from alignez_gguf.candidates import Candidate, Source, span
from alignez_gguf.control import Field
from alignez_gguf.directions import Directions
from alignez_gguf.edits import Edits, paper_edits, span_edits
from alignez_gguf.engines import HOOKS, Hook
from alignez_gguf.errors import NoGainError, QueryError, SteeringError
from alignez_gguf.pairs import PreferencePair, unweighted
from alignez_gguf.pipeline.embeddings import Embeddings, Place
from alignez_gguf.pipeline.job import Job, Settings
from alignez_gguf.pipeline.kept import kept_figures, kept_json, known_figures
from alignez_gguf.pipeline.stages import Fit, fit_directions, persona_divergence, scorers
from alignez_gguf.scope import GENERATION, Scope
from alignez_gguf.scoring import Figures, Scorer
from alignez_gguf.selection import Baseline, Search, Selection, random_edits

SVD_RANKS = (1, 2, 3)
"""Ranks of the subspaces that the search tries."""

SEARCHED = (GENERATION, Scope("first", 4), Scope("first", 1))
"""Time steps that the search tries, the most of them first."""

COMPARED = (Scope("all"), *SEARCHED)
"""Time steps under which the chosen edit is measured."""

SCOPE_MARGIN = 0.005
"""Nat by which a narrower scope must be better."""

_MAX_SELECTION = 64
"""Queries that the selection looks at, at most: each costs a token per candidate."""
_SELECTION_SHARE = 0.4
_MIN_SELECTION = 8

_RANDOM = "random directions of the same size"


@dataclass(frozen=True)
class Made:
    """Edits, and how they came about.

    Attributes:
        edits: at strength 1.
        directions: the ones they are made of.
        recipe: for the control file.
        selection: what the label-free choice saw.
        baselines: what the choice is compared with.
        scopes: figures of the chosen edit under other time steps than those it was chosen for; only of the
            best one.
        held_out: the pairs whose queries the choice looked at.
    """

    edits: Edits
    directions: Directions
    recipe: Mapping[str, Field]
    selection: Selection | None = None
    baselines: Sequence[Baseline] = ()
    scopes: Mapping[str, Figures] = field(default_factory=dict)
    held_out: Sequence[PreferencePair] = ()


def paper(job: Job, pairs: Sequence[PreferencePair]) -> Made:
    """AlignEZ to the letter: CCS at the last token of the response, the decision rule, every layer."""
    settings = job.settings
    method, place = settings.method or "ccs", paper_place(settings)
    fit = fit_directions(Embeddings(job, pairs, places(job)), method, place, rank=1)
    edits = paper_edits(fit.directions, fit.class_gap, threshold=settings.threshold, layers=settings.layers)
    added = [layer for layer, edit in edits.items() if edit.add is not None]
    if added and not can_add(job, place.hook):
        raise SteeringError(
            f"the recipe adds at layers {span(tuple(added))}, and {job.target.info.arch} models have a norm "
            "behind the MLP, after which a gap between MLP outputs moves next to nothing; use --hook "
            "residual, or --recipe auto"
        )
    if not edits:
        raise NoGainError(
            f"no layer's probe is sure enough (threshold {settings.threshold:g}); give more queries, "
            "lower --threshold, or use --recipe auto"
        )
    recipe: dict[str, Field] = {
        "method": method,
        "reading": place.reading,
        "hook": place.hook,
        "rank": 1,
        "threshold": settings.threshold,
        "pairs.fit": len(pairs),
    }
    return Made(edits, fit.directions, recipe)


def auto(job: Job, pairs: Sequence[PreferencePair]) -> Made:
    """Fit on a part of the pairs, choose on the queries of the others."""
    settings = job.settings
    fit_pairs, held_out = split(pairs, settings.seed)
    hooks = _readable(job)
    candidates = sources(settings, hooks)
    for unknown in set(HOOKS).difference(hooks if settings.hook is None else HOOKS):
        job.reporter.note(f"--hook {unknown}: cannot be read in this architecture and is left out")
    fits = fit_sources(job, fit_pairs, candidates)
    with scorers(job, held_out) as scorer:
        scope, selection = _search_scopes(job, pairs, held_out, fits, candidates, scorer)
        best, scored = selection.chosen.candidate, scorer(scope)
        compared = kept_figures(
            _figures_path(job, "comparison", pairs, held_out, ".json", candidate=best, scope=scope),
            lambda: _comparison(job, fits.edits(best), scope, scorer),
        )
        persona = scored.figures(np.log(np.maximum(scored.p_helpful, np.finfo(np.float32).tiny)))
    random = compared.pop(_RANDOM)
    baselines = (
        Baseline("no edit", Figures((0.0,) * len(held_out)), 0.0),
        Baseline("helpful persona as a prompt", persona, persona_divergence(job, held_out)),
        Baseline(_RANDOM, random, random.kl),
    )
    if settings.choose is not None:
        selection = selection.choose(settings.choose)
        if selection.chosen.candidate != best:
            best, compared = selection.chosen.candidate, {}
    recipe: dict[str, Field] = {
        "method": best.source.method,
        "reading": best.source.reading,
        "hook": best.source.hook,
        "rank": best.source.rank,
        "operation": best.operation,
        "amount": float(best.amount),
        "added_layers": span(best.layers if best.added is None else best.added) if best.amount else "",
        "scope": str(scope),
        "pairs.fit": len(fit_pairs),
        "pairs.selection": len(held_out),
    }
    fitted = fits.of(best.source).directions
    return Made(fits.edits(best), fitted, recipe, selection, baselines, compared, held_out)


def _search_scopes(
    job: Job,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    fits: Fits,
    candidates: Sequence[Source],
    scorer: Callable[[Scope], Scorer],
) -> tuple[Scope, Selection]:
    """The best choice among several scopes, the first of which is the widest.

    All of them steer the first token alike, so that what it says of an edit is measured once. The score sees
    only how an answer begins, so that a narrower scope never loses by it: it is taken only if the net is
    greater by a margin, and only what is better at all is looked for there.
    """
    settings = job.settings
    scopes = SEARCHED if settings.scope is None else (settings.scope,)
    layers = settings.layers or tuple(range(job.target.info.n_layer))
    best: tuple[Scope, Selection] | None = None
    searches: list[Search] = []
    shared: dict[Candidate, Figures] = {}
    for scope in scopes:
        with (
            job.reporter.stage(f"trying edits ({scope})", None) as advance,
            known_figures(_figures_path(job, "scores", pairs, held_out, ".jsonl", scope=scope)) as known,
        ):
            search = Search(
                scorer(scope),
                fits.edits,
                budget=settings.kl_budget,
                floor=0.0 if best is None else _net(best[1]),
                can_add=lambda source: can_add(job, source.hook),
                advance=partial(_count, advance),
                known=known,
                shared=shared,
            )
            searches.append(search)
            found = search.run(candidates, layers)
            if found is not None and (best is None or _net(found) > _net(best[1]) + SCOPE_MARGIN):
                best = scope, found
            shared = {**search.first_tokens, **shared}
    if best is None:
        raise searches[0].no_gain()
    return best


def _net(selection: Selection) -> float:
    return selection.chosen.figures.net or 0.0


@dataclass(frozen=True)
class Fits:
    """What every source found, and the edits that candidates make of it."""

    fits: Mapping[tuple[str, Place], Fit]

    def of(self, source: Source) -> Fit:
        return self.fits[source.method, _place(source)]

    def edits(self, candidate: Candidate) -> Edits:
        fit = self.of(candidate.source)
        return span_edits(
            fit.directions.vectors[:, : candidate.source.rank],
            fit.class_gap,
            remove=candidate.operation != "add",
            amount=candidate.amount,
            layers=candidate.layers,
            added=candidate.added,
        )


def fit_sources(job: Job, pairs: Sequence[PreferencePair], sources: Sequence[Source]) -> Fits:
    """Fit each method once at each place, with the highest rank that is asked of it."""
    embeddings = Embeddings(job, pairs, list(map(_place, sources)))
    fits: dict[tuple[str, Place], Fit] = {}
    for source in sources:
        key = source.method, _place(source)
        if key not in fits:
            rank = max(other.rank for other in sources if other.method == source.method)
            fits[key] = fit_directions(embeddings, *key, rank)
    return Fits(fits)


def _place(source: Source) -> Place:
    return Place(source.reading, source.hook)


def can_add(job: Job, hook: Hook) -> bool:
    """Whether a class gap between hidden states at `hook` can be added at the end of the target's blocks."""
    return hook == "residual" or not job.target.info.has_post_norm


def paper_place(settings: Settings) -> Place:
    """Where the paper embeds pairs, unless another place is asked for."""
    return Place(settings.reading or "response", settings.hook or "mlp")


def split(pairs: Sequence[PreferencePair], seed: int) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs to fit on, and one pair of each other query, to choose on."""
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    n_selection = min(max(round(len(queries) * _SELECTION_SHARE), _MIN_SELECTION), _MAX_SELECTION)
    if len(queries) < n_selection + _MIN_SELECTION:
        raise QueryError(
            f"{len(queries)} usable pairs are too few to fit and to choose on; give at least "
            f"{2 * _MIN_SELECTION} queries that the personas answer differently"
        )
    order = np.random.default_rng(seed).permutation(len(queries))
    chosen = {queries[index] for index in order[:n_selection]}
    fitted = [pair for pair in pairs if pair.query not in chosen]
    held_out = {pair.query: pair for pair in reversed(pairs) if pair.query in chosen}
    return fitted, list(reversed(held_out.values()))


def places(job: Job) -> list[Place]:
    """Where pairs are embedded.

    The paper's recipe also reads what the search would: of texts that are read anyway, this costs little.
    """
    searched = list(map(_place, sources(job.settings, _readable(job))))
    return [paper_place(job.settings), *searched] if job.settings.recipe == "paper" else searched


def _readable(job: Job) -> list[Hook]:
    """What the engine can read of its model. Kept, since it has to compute something to tell."""
    path = job.work.part("hooks", model=job.engine.info).with_suffix(".json")
    hooks: list[Hook] = kept_json(path, lambda: sorted(job.engine.hooks))
    return hooks


def sources(settings: Settings, hooks: Collection[Hook] = HOOKS) -> list[Source]:
    """Where directions are looked for under these settings.

    The residual stream is read where a persona speaks loudest in it, at the end of the prompt, unless another
    position is asked for.

    Args:
        settings: of the job.
        hooks: that can be read; of what cannot, only what is asked for is looked at, which then fails.
    """
    methods = directions.METHODS if settings.method is None else (settings.method,)
    wanted = (hooks or HOOKS) if settings.hook is None else (settings.hook,)
    places = [
        Place("prompt", "mlp"),
        Place("response", "mlp"),
        Place("response-mean", "mlp"),
        Place("prompt", "residual"),
        Place("response", "residual"),
        Place("response-mean", "residual"),
    ]
    if settings.reading is None and settings.hook is None:
        places = places[:4]
    return [
        Source(method, reading, rank, hook)
        for reading, hook in places
        if settings.reading in (None, reading) and hook in wanted
        for method in methods
        for rank in (SVD_RANKS if method.startswith("svd") else (1,))
    ]


def _count(advance: Callable[[int], None], _: str) -> None:
    advance(1)


def _comparison(
    job: Job, edits: Edits, chosen: Scope, scorer: Callable[[Scope], Scorer]
) -> dict[str, Figures]:
    """Random directions of the size of some edits, and those edits under other scopes, by their names."""
    others = [scope for scope in COMPARED if scope != chosen]
    with job.reporter.stage("comparing the chosen edit", 1 + len(others)) as advance:
        found = {_RANDOM: scorer(chosen).score(random_edits(edits, job.settings.seed))}
        advance(1)
        for scope in others:
            found[str(scope)] = scorer(scope).score(edits)
            advance(1)
    return found


def _figures_path(
    job: Job,
    name: str,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    suffix: str,
    **determined_by: Any,
) -> Path:
    """Where figures are kept that depend on a fit on `pairs`."""
    return job.work.part(
        name,
        model=job.engine.info,
        target=job.target.info,
        templates=job.templates,
        pairs=list(pairs),
        held_out=unweighted(held_out),
        seed=job.settings.seed,
        figures=[one.name for one in fields(Figures)],  # others than of an earlier version are not read
        **determined_by,
    ).with_suffix(suffix)
