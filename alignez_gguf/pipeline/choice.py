"""The choice of an edit for a job: from all sources, behind a gate or not, and how much of it.

`selection.search` compares edits by their gain in log-likelihood. What a gate keeps harmless requests from
can be stronger than that: likelihoods of sampled refusals say little about how often another one is given.
So behind a gate the amount is raised while more of what the safety-first persona declines is declined. And a
few tokens may be enough there: how an answer begins decides whether it declines; the rest is worded better
unsteered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from alignez_gguf.control.edits import Edits, span_edits, with_additions_at_mlp
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.errors import NoGainError
from alignez_gguf.pairs.pairs import PreferencePair, unweighted
from alignez_gguf.pipeline.confirmation import AnswerCounts, count_greedy_answers, least_gain
from alignez_gguf.pipeline.embeddings import ActivationSite, Embeddings
from alignez_gguf.pipeline.job import Job
from alignez_gguf.pipeline.score_cache import score_cache
from alignez_gguf.pipeline.stages import DirectionFit, fit_directions, open_scorer
from alignez_gguf.pipeline.verdicts import alternating, declines
from alignez_gguf.selection.candidates import MOST, SVD_RANKS, Candidate, Source
from alignez_gguf.selection.scoring import EditScore
from alignez_gguf.selection.search import Scored, Search, Selection, ranked

_BEGINNINGS = (Scope("first", 6), Scope("first", 12))
"""Beginnings of an answer that are tried behind a gate in place of all of it."""
_STRONGER = (1.4, 2.0)
"""Factors of the best amount that are tried behind a gate."""
_KEPT_GAIN = 0.5
"""The share of the best gain that a stronger edit has to keep."""


@dataclass(frozen=True)
class FittedDirections:
    """The fitted directions of every source; makes the edits of a candidate.

    Attributes:
        fits: by method and place.
        has_post_norm: whether a norm follows the MLP of the model that is edited.
    """

    fits: Mapping[tuple[str, ActivationSite], DirectionFit]
    has_post_norm: bool

    def of(self, source: Source) -> DirectionFit:
        return self.fits[source.method, site_of(source)]

    def edits(self, candidate: Candidate) -> Edits:
        fit = self.of(candidate.source)
        edits = span_edits(
            fit.directions.vectors[:, : candidate.source.rank],
            fit.class_gap,
            remove=candidate.operation != "add",
            amount=candidate.amount,
            layers=candidate.layers,
        )
        is_before_norm = self.has_post_norm and candidate.source.hook == "mlp"
        return with_additions_at_mlp(edits) if is_before_norm else edits


def fit_sources(job: Job, pairs: Sequence[PreferencePair], sources: Sequence[Source]) -> FittedDirections:
    """Fit each method once at each place, with the highest rank that is tried."""
    embeddings = Embeddings(job, pairs, list(map(site_of, sources)))
    fits: dict[tuple[str, ActivationSite], DirectionFit] = {}
    for source in sources:
        key = source.method, site_of(source)
        if key not in fits:
            rank = max(SVD_RANKS) if source.method.startswith("svd") else 1
            fits[key] = fit_directions(embeddings, *key, rank)
    return FittedDirections(fits, job.target.info.has_post_norm)


def site_of(source: Source) -> ActivationSite:
    """Return the place at which a source is read."""
    return ActivationSite(source.reading, source.hook)


def choose(
    job: Job,
    fits: FittedDirections,
    sources: Sequence[Source],
    pairs: Sequence[PreferencePair],
    choice_pairs: Sequence[PreferencePair],
    gate: Gate | None,
    twins: Sequence[str],
) -> tuple[Selection, Gate | None]:
    """Choose the best edit, and whether it acts behind the gate, where there is one.

    Without it an edit can also mend answers to what looks harmless. That has to be a gain for certain:
    otherwise such requests are left alone. So edits without the gate are searched for only where the best one
    behind it gains more for certain when it steers every request.

    Args:
        fits: of all sources.
        pairs: of the whole job.
        choice_pairs: those to choose on.
        twins: harmful requests that the model does not decline by itself; nothing was fitted on them but the
            gate.

    Raises:
        NoGainError: nothing gains.
    """
    behind = None if gate is None else _searched(job, fits, sources, pairs, choice_pairs, gate)
    if isinstance(behind, Selection) and not _is_better_without(job, fits, behind, choice_pairs):
        found = behind
    else:
        everywhere = _searched(job, fits, sources, pairs, choice_pairs, None)
        if isinstance(everywhere, Selection):
            found, gate = everywhere, None
        elif isinstance(behind, Selection):
            found = behind
        else:
            raise everywhere
    if job.settings.choose is not None:
        return found.choose(job.settings.choose), gate
    return (found if gate is None else _raised(job, fits, found, choice_pairs, gate, twins)), gate


def _is_better_without(
    job: Job, fits: FittedDirections, behind: Selection, choice_pairs: Sequence[PreferencePair]
) -> bool:
    """Whether the best edit behind the gate gains more for certain when it steers every request."""
    best = behind.chosen
    with open_scorer(job, choice_pairs) as scorer:
        everywhere = scorer.score(fits.edits(best.candidate), scope=best.candidate.scope)
    more = everywhere.gains_over(best.score)
    is_better = more.gain > least_gain(more)
    result = "there is no gate" if is_better else "not more for certain, so that the gate stays"
    job.reporter.note(
        f"the best edit gains {best.score.gain:+.2f} nat behind the gate, and {everywhere.gain:+.2f} where "
        f"it steers every request: {result}"
    )
    return is_better


def _searched(
    job: Job,
    fits: FittedDirections,
    sources: Sequence[Source],
    pairs: Sequence[PreferencePair],
    choice_pairs: Sequence[PreferencePair],
    gate: Gate | None,
) -> Selection | NoGainError:
    """The search behind a gate, or without one; the reason where nothing gains."""
    layers = job.settings.layers or tuple(range(job.target.info.n_layer))
    asked = job.settings.scope
    scopes = (asked or GENERATION,) if asked or gate is None else (GENERATION, *_BEGINNINGS)
    with (
        open_scorer(job, choice_pairs, gate) as scorer,
        job.reporter.stage("trying edits" + (" behind the gate" if gate else ""), None) as advance,
        score_cache(_score_path(job, pairs, choice_pairs, gate)) as known,
    ):
        search = Search(
            scorer,
            fits.edits,
            scopes,
            budget=job.settings.kl_budget,
            known=known,
            advance=advance,
        )
        try:
            return search.run(sources, layers)
        except NoGainError as error:
            return error


def _raised(
    job: Job,
    fits: FittedDirections,
    selection: Selection,
    choice_pairs: Sequence[PreferencePair],
    gate: Gate,
    twins: Sequence[str],
) -> Selection:
    """The selection with a larger amount, where by what is said that is better.

    Counts answers to the choice's queries and to `twins`.
    """
    best = selection.chosen
    if not best.candidate.amount:
        return selection
    scope = best.candidate.scope
    harmful = {pair.query: declines(pair) for pair in alternating(choice_pairs)} | dict.fromkeys(twins, True)
    queries = list(harmful)

    def progress(answers: AnswerCounts) -> int:
        """How many answers decline what they should, less those that decline what they should not."""
        rows = zip(answers.declined, harmful.values(), strict=True)
        return sum(declined * (1 if wanted else -1) for declined, wanted in rows)

    before = count_greedy_answers(job, {}, queries, scope, None)
    now = count_greedy_answers(job, fits.edits(best.candidate), queries, scope, gate)
    if before is None or now is None:
        return selection
    chosen, tried = best, list(selection.tried)
    with open_scorer(job, choice_pairs, gate) as scorer:
        for factor in _STRONGER:
            candidate = replace(best.candidate, amount=factor * best.candidate.amount)
            if candidate.amount > MOST:
                break
            score = scorer.score(fits.edits(candidate), scope=scope)
            least = max(_KEPT_GAIN * best.score.gain, least_gain(score))
            if score.gain <= least or (score.kl or 0.0) > selection.budget:
                break
            stronger = count_greedy_answers(job, fits.edits(candidate), queries, scope, gate)
            if stronger is None or stronger.breaks_more_than(before):
                break
            tried = [one for one in tried if one.candidate != candidate] + [Scored(candidate, score)]
            if progress(stronger) > progress(now):
                chosen, now = Scored(candidate, score), stronger
    if chosen is not best:
        job.reporter.note(
            f"the amount is raised from {best.candidate.amount:g}x to {chosen.candidate.amount:g}x, by which "
            "more of what is harmful is declined"
        )
    return replace(selection, chosen=chosen, tried=ranked(tried))


def _score_path(
    job: Job,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    gate: Gate | None,
) -> Path:
    """Return the file that keeps figures which depend on a fit on `pairs`."""
    return job.work.part(
        "scores",
        model=job.engine.info,
        target=job.target.info,
        templates=job.templates,
        pairs=list(pairs),
        held_out=unweighted(held_out),
        seed=job.settings.seed,
        gate=gate and gate.digest,
        figures=[field.name for field in fields(EditScore)],  # others than of an earlier version are not read
    ).with_suffix(".jsonl")
