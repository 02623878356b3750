"""How directions become edits: AlignEZ to the letter, or the label-free choice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from alignez_gguf.control.control_file import Field
from alignez_gguf.control.edits import Edits, paper_edits, with_additions_at_mlp
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.layer_ranges import span
from alignez_gguf.control.scope import GENERATION
from alignez_gguf.directions.base import Directions
from alignez_gguf.errors import NoGainError, QueryError, RuntimeUnavailableError
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline.choice import choose, fit_sources, site_of
from alignez_gguf.pipeline.confirmation import Confirmation, confirm, measure, require_no_harm
from alignez_gguf.pipeline.embeddings import ActivationSite, Embeddings
from alignez_gguf.pipeline.gating import fitted_gate
from alignez_gguf.pipeline.job import Job, Settings
from alignez_gguf.pipeline.stages import fit_directions
from alignez_gguf.pipeline.verdicts import (
    MIN_VERDICTS,
    QueryContrast,
    own_contrast,
    own_verdicts,
    persona_contrast,
    split,
)
from alignez_gguf.readout import HOOKS, Hook, ReadingPosition
from alignez_gguf.selection.candidates import Source
from alignez_gguf.selection.search import Selection

SEARCHED_METHODS = ("ccs", "svd-diff", "mean", "logistic")
"""Methods that the search tries on what tells the personas apart; verdicts are told apart by their means."""


_N_TWINS = 45
"""Harmful twins at most on whose answers an edit is chosen, and as many others on which it is confirmed."""
_OFTEN = 0.3
"""A share of restarts from which on it is told that they disagree."""


@dataclass(frozen=True)
class RecipeResult:
    """Edits, and how they came about.

    Attributes:
        edits: at strength 1.
        directions: the ones they are made of.
        recipe: for the control file.
        selection: what the label-free choice saw.
        confirmation: what the chosen edit does on queries that neither fit nor choice saw.
        held_out: the pairs that it was confirmed on.
        gate: for which requests the edits are made; for all where it is None.
    """

    edits: Edits
    directions: Directions
    recipe: Mapping[str, Field]
    selection: Selection | None = None
    confirmation: Confirmation | None = None
    held_out: Sequence[PreferencePair] = ()
    gate: Gate | None = None


def paper(job: Job, pairs: Sequence[PreferencePair]) -> RecipeResult:
    """AlignEZ to the letter: CCS at the last token of the response, the decision rule, every layer.

    What it gains is measured as that of `auto` is, on queries that the fit has not seen, and told; a gain is
    not required, but what is sure to do harm is an error.
    """
    settings = job.settings
    method, site = settings.method or "ccs", paper_site(settings)
    fit_pairs, confirmation_pairs = _with_some_left(job, pairs)
    fit = fit_directions(Embeddings(job, fit_pairs, activation_sites(job)), method, site, rank=1)
    edits = paper_edits(fit.directions, fit.class_gap, threshold=settings.threshold, layers=settings.layers)
    if job.target.info.has_post_norm and site.hook == "mlp":
        edits = with_additions_at_mlp(edits)
    if not edits:
        raise NoGainError(
            f"no layer's probe is sure enough (threshold {settings.threshold:g}); give more queries, "
            "lower --threshold, or use --recipe auto"
        )
    for note in _about_probes(fit.directions, len(fit_pairs), tuple(edits)):
        job.reporter.note(note)
    recipe: dict[str, Field] = {
        "method": method,
        "reading": site.reading,
        "hook": site.hook,
        "rank": 1,
        "threshold": settings.threshold,
        "pairs.fit": len(fit_pairs),
        "pairs.confirmation": len(confirmation_pairs),
    }
    confirmation = None
    if confirmation_pairs:
        try:
            confirmation = measure(job, edits, confirmation_pairs, settings.scope or GENERATION)
        except RuntimeUnavailableError as error:
            job.reporter.note(f"what the edits gain is not measured: {error}")
        else:
            require_no_harm(confirmation)
    return RecipeResult(edits, fit.directions, recipe, None, confirmation, confirmation_pairs)


def _with_some_left(
    job: Job, pairs: Sequence[PreferencePair]
) -> tuple[Sequence[PreferencePair], Sequence[PreferencePair]]:
    """The pairs to fit on, and those to measure the gain on: none where there are too few for both."""
    try:
        *_, confirmation_pairs = split(pairs, job.settings.seed)
    except QueryError:
        job.reporter.note(f"{len(pairs)} pairs are too few to measure on some of them what the edits gain")
        return pairs, ()
    left_out = {pair.query for pair in confirmation_pairs}
    return [pair for pair in pairs if pair.query not in left_out], confirmation_pairs


def _about_probes(found: Directions, n_pairs: int, edited: Sequence[int]) -> Iterator[str]:
    """What to know of the probes before their edits are trusted."""
    chance = 0.5 + 1.645 * 0.5 / math.sqrt(2 * n_pairs)
    at_chance = tuple(layer for layer in edited if found.accuracy[layer] <= chance)
    if at_chance:
        yield (
            f"at {len(at_chance)} of {len(edited)} edited layers ({span(at_chance)}) the probe tells "
            f"held-out answers apart no better than chance does (accuracy up to {chance:.2f})"
        )
    if found.flipped is not None:
        left_to_chance = tuple(layer for layer in edited if found.flipped[layer] >= _OFTEN)
        if left_to_chance:
            yield (
                f"at {len(left_to_chance)} of {len(edited)} edited layers ({span(left_to_chance)}) "
                f"{_OFTEN:.0%} or more of the restarts call the other class 1, so that whether the rule "
                "removes or adds is left to chance"
            )


def auto(job: Job, pairs: Sequence[PreferencePair]) -> RecipeResult:
    """Fit on a part of the queries, choose on another, and confirm the choice on a third one."""
    settings = job.settings
    fit_pairs, choice_pairs, confirmation_pairs = split(pairs, settings.seed)
    hooks = _readable(job)
    candidates = sources(settings, hooks, _without_contrast(job, fit_pairs))
    for unknown in set(HOOKS).difference(hooks if settings.hook is None else HOOKS):
        job.reporter.note(f"--hook {unknown}: cannot be read in this architecture and is left out")
    fits = fit_sources(job, fit_pairs, candidates)
    held_out = [pair.query for pair in (*choice_pairs, *confirmation_pairs)]
    gate = fitted_gate(job, fit_pairs, held_out)
    twins = [] if gate is None else [query for query, _ in job.templates.twins if query not in held_out]
    unaided = _not_declined(job, twins[::2][:_N_TWINS])
    selection, gate = choose(job, fits, candidates, pairs, choice_pairs, gate, unaided)
    best = selection.chosen.candidate
    edits = fits.edits(best)
    confirmation = confirm(job, edits, confirmation_pairs, best.scope, gate, twins[1::2][:_N_TWINS])
    recipe: dict[str, Field] = {
        "method": best.source.method,
        "reading": best.source.reading,
        "hook": best.source.hook,
        "rank": best.source.rank,
        "operation": best.operation,
        "amount": float(best.amount),
        "scope": str(best.scope),
        "pairs.fit": len(fit_pairs),
        "pairs.selection": len(choice_pairs),
        "pairs.confirmation": len(confirmation_pairs),
    }
    fitted = fits.of(best.source).directions
    return RecipeResult(edits, fitted, recipe, selection, confirmation, confirmation_pairs, gate)


def _not_declined(job: Job, harmful: Sequence[str]) -> list[str]:
    """The harmful requests that the model does not decline by itself, on which an edit can do better."""
    return [query for query, declines in own_verdicts(job, harmful).items() if not declines]


def paper_site(settings: Settings) -> ActivationSite:
    """Where the paper embeds pairs, unless another place is asked for."""
    return ActivationSite(settings.reading or "response", settings.hook or "mlp")


def activation_sites(job: Job) -> list[ActivationSite]:
    """Where pairs are embedded.

    The paper's recipe also reads what the search would: of texts that are read anyway, this costs little.
    """
    searched = list(map(site_of, sources(job.settings, _readable(job))))
    return [paper_site(job.settings), *searched] if job.settings.recipe == "paper" else searched


def _readable(job: Job) -> list[Hook]:
    """What the engine can read of its model. Kept, since it has to compute something to tell."""
    hooks: list[Hook] = job.work.cached_json("hooks", lambda: sorted(job.engine.hooks), model=job.engine.info)
    return hooks


def sources(
    settings: Settings,
    hooks: Collection[Hook] = HOOKS,
    missing: Collection[ReadingPosition] = (),
) -> list[Source]:
    """Where directions are looked for under these settings.

    Unless a position is asked for, the residual stream is read only where a persona speaks loudest in it, at
    the end of the prompt, and nothing is read as a mean over a response.

    Args:
        settings: of the job.
        hooks: that can be read; of what cannot, only what is asked for is looked at, which then fails.
        missing: readings for which there are too few queries of a kind.
    """
    wanted = (hooks or HOOKS) if settings.hook is None else (settings.hook,)
    verdict_hook = settings.hook or "mlp"
    sites = [
        ActivationSite("refusal", verdict_hook),
        ActivationSite("verdict", verdict_hook),
        ActivationSite("prompt", "mlp"),
        ActivationSite("response", "mlp"),
        ActivationSite("prompt", "residual"),
        ActivationSite("response", "residual"),
        ActivationSite("response-mean", "mlp"),
        ActivationSite("response-mean", "residual"),
    ]
    if settings.reading is None and settings.hook is None:
        sites = sites[:5]
    return [
        Source(method, site.reading, 1, site.hook)
        for site in sites
        if settings.reading in (None, site.reading) and site.hook in wanted
        if site.reading not in missing
        for method in _methods(settings, site)
    ]


def _methods(settings: Settings, site: ActivationSite) -> Sequence[str]:
    """The methods that are tried at a place."""
    if site.contrasts_verdicts:
        return ("mean",) if settings.method is None or settings.reading is None else (settings.method,)
    return SEARCHED_METHODS if settings.method is None else (settings.method,)


def _without_contrast(job: Job, pairs: Sequence[PreferencePair]) -> list[ReadingPosition]:
    """The readings for which there are too few queries of a kind, such as ones that the model declines."""
    contrasts: dict[ReadingPosition, QueryContrast] = {
        "verdict": persona_contrast(pairs),
        "refusal": own_contrast(job, pairs),
    }
    return [
        reading
        for reading, opposed in contrasts.items()
        if min((len(set(side)) for side in zip(*opposed, strict=True)), default=0) < MIN_VERDICTS
    ]
