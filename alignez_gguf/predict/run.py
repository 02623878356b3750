"""The prediction as a whole: pairs as the main job makes them, then what tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import NoGainError, QueryError
from alignez_gguf.pairs.filters import PairFilterReport
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline.embeddings import ActivationSite, Embeddings
from alignez_gguf.pipeline.feasibility import lack_of_contrast
from alignez_gguf.pipeline.job import Job
from alignez_gguf.pipeline.recipes import activation_sites, auto, paper_site
from alignez_gguf.pipeline.stages import self_generated_pairs, usable_pairs
from alignez_gguf.predict.separability import (
    MIN_QUERIES,
    PERMUTATIONS,
    Hits,
    Separability,
    hits,
    separability,
)
from alignez_gguf.predict.surface import surface_features
from alignez_gguf.predict.verdict import HeldOut, Verdict, judge
from alignez_gguf.readout import Hook, ReadingPosition

QUICK_METHOD = "svd-diff"
"""The only method of the quick search: in closed form, and rarely far from the best."""

EmbedPairs = Callable[[Sequence[PreferencePair], Callable[[int], None]], NDArray[np.float32]]
"""From pairs, and what is told of the progress, to features [2, n_pairs, n_dimensions]."""


@dataclass(frozen=True)
class Prediction:
    """Whether self-alignment will work on a model, and everything that this is judged by.

    Attributes:
        model: which one.
        reading, hook: where its embeddings were read.
        pairs: how many it wrote, and how many are of use; none where its personas show no contrast, which is
            asked first.
        unfiltered: accuracy of the best layer for all pairs with two answers, as the paper counts; `None`
            where there are too few.
        own: of usable pairs, by the model's own embeddings, layer by layer; `None` where there are too few.
        surface: of usable pairs, by length and first word.
        embedder: of usable pairs, by an off-the-shelf sentence embedder, if there is one.
        held_out: the score of the best edit of a quick search; `None` where it was skipped.
        verdict: what follows.
    """

    model: ModelInfo
    reading: ReadingPosition
    hook: Hook
    pairs: PairFilterReport
    unfiltered: float | None
    own: Separability | None
    surface: Separability | None
    embedder: Separability | None
    held_out: HeldOut | None
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        """All of it as JSON values, with what follows from the figures beside them."""

        def of(found: Separability | None) -> dict[str, Any] | None:
            if found is None:
                return None
            return {**asdict(found), "best_accuracy": found.best_accuracy, "adjusted": found.adjusted}

        document = asdict(self)
        document |= {name: of(getattr(self, name)) for name in ("own", "surface", "embedder")}
        if self.held_out is not None and self.held_out.figures is not None:
            figures = self.held_out.figures
            document["held_out"]["figures"] |= {
                "gain": figures.gain,
                "standard_error": figures.standard_error,
            }
        return document


def predict(
    job: Job,
    queries: Sequence[str],
    *,
    embed: EmbedPairs | None = None,
    quick: bool = False,
    permutations: int = PERMUTATIONS,
) -> Prediction:
    """Predict from self-generated pairs whether the main job will find something.

    Args:
        job: its settings say where embeddings are read; by default at the last token of the response, in the
            MLP output, as in the paper. All that it leaves in its work directory serves a later export.
        queries: unlabelled, without repetitions.
        embed: an off-the-shelf sentence embedder.
        quick: skip the held-out score.
        permutations: random labellings by which chance is known.

    Raises:
        QueryError: there are fewer than 10 queries, or one is too long.
    """
    if len(queries) < MIN_QUERIES:
        raise QueryError(
            f"{len(queries)} queries are too few to predict anything; give at least {MIN_QUERIES}"
        )
    place = paper_site(job.settings)
    if reason := lack_of_contrast(job):
        return Prediction(
            model=job.engine.info,
            reading=place.reading,
            hook=place.hook,
            pairs=PairFilterReport(0, 0),
            unfiltered=None,
            own=None,
            surface=None,
            embedder=None,
            held_out=None,
            verdict=Verdict("unlikely", (reason,)),
        )
    generated = self_generated_pairs(job, queries)
    searched = () if quick else activation_sites(_quick(job))
    usable, report = usable_pairs(job, generated, (), [place, *searched])
    kept = set(usable)
    left_out = [pair for pair in generated if pair.helpful and pair.harmful and pair not in kept]
    own_layers = _embeddings(job, usable, place)
    unfiltered = _unfiltered(job, usable, own_layers, left_out, place)
    own = surface = embedder = held_out = None
    if _n_queries(usable) >= MIN_QUERIES:
        compare = _Comparison(job, usable, permutations)
        own = compare.separability("telling answers apart", own_layers)
        surface = compare.surface()
        if embed is not None:
            with job.reporter.stage("embedding answers", len(usable)) as advance:
                features = embed(usable, advance)
            embedder = compare.separability("telling answers apart by the embedder", [features])
        held_out = None if quick else quick_search(job, usable)
    return Prediction(
        model=job.engine.info,
        reading=place.reading,
        hook=place.hook,
        pairs=report,
        unfiltered=unfiltered,
        own=own,
        surface=surface,
        embedder=embedder,
        held_out=held_out,
        verdict=judge(own, held_out, report),
    )


def quick_search(job: Job, pairs: Sequence[PreferencePair]) -> HeldOut:
    """The label-free choice of the main job with one method instead of several, confirmed as there."""
    try:
        made = auto(_quick(job), pairs)
    except (NoGainError, QueryError) as error:
        return HeldOut(note=str(error))
    assert made.selection is not None
    assert made.confirmation is not None
    figures = made.confirmation.score
    return HeldOut(str(made.selection.chosen.candidate), figures, len(figures.gains))


def _quick(job: Job) -> Job:
    """The job of the quick search."""
    settings = job.settings
    return replace(
        job,
        settings=replace(
            settings,
            method=settings.method or QUICK_METHOD,
            reading=None,
            hook=None,
        ),
    )


class _Comparison:
    """Separability of the same pairs, by one thing after the other."""

    def __init__(self, job: Job, pairs: Sequence[PreferencePair], permutations: int) -> None:
        self._job = job
        self._queries = [pair.query for pair in pairs]
        self._permutations = permutations
        self._cues = [surface_features(pairs)]
        self._cue_hits = hits(self._cues, self._queries, job.settings.seed)

    def separability(self, title: str, layers: Sequence[NDArray[Any]]) -> Separability:
        return self._measured(title, layers, self._cue_hits)

    def surface(self) -> Separability:
        return self._measured("telling answers apart by surface cues", self._cues, None)

    def _measured(self, title: str, layers: Sequence[NDArray[Any]], against: Hits | None) -> Separability:
        with self._job.reporter.stage(title, self._permutations) as advance:
            return separability(
                layers,
                self._queries,
                surface=against,
                seed=self._job.settings.seed,
                permutations=self._permutations,
                advance=advance,
            )


def _unfiltered(
    job: Job,
    usable: Sequence[PreferencePair],
    usable_layers: Sequence[NDArray[Any]],
    left_out: Sequence[PreferencePair],
    place: ActivationSite,
) -> float | None:
    """Accuracy of the best layer for all pairs, if there are enough."""
    pairs, layers = [*usable, *left_out], usable_layers
    if _n_queries(pairs) < MIN_QUERIES:
        return None
    if left_out:
        others = _embeddings(job, left_out, place)
        layers = [np.concatenate(both, axis=1) for both in zip(usable_layers, others, strict=True)]
    return float(hits(layers, [pair.query for pair in pairs], job.settings.seed).accuracy.max())


def _embeddings(job: Job, pairs: Sequence[PreferencePair], place: ActivationSite) -> list[NDArray[Any]]:
    """Features of every layer, [2, n_pairs, n_embd] each."""
    if not pairs:
        return [np.empty((2, 0, job.engine.info.n_embd), np.float16)] * job.engine.info.n_layer
    read = Embeddings(job, pairs, [place]).at(place)
    return [np.stack(both) for both in zip(read.helpful, read.harmful, strict=True)]


def _n_queries(pairs: Sequence[PreferencePair]) -> int:
    return len({pair.query for pair in pairs})
