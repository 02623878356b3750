"""The stages of a job. Each finds in the work directory what an earlier run has done, and adds the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf import directions
from alignez_gguf.activations import class_gap
from alignez_gguf.directions import Directions
from alignez_gguf.edits import Edits
from alignez_gguf.engines import GenerationRequest, Passage, Sampling
from alignez_gguf.filters import PairFilterReport, filter_pairs, text_fault
from alignez_gguf.generation import (
    answer_prompts,
    characteristics,
    compare_personas,
    default_sampling,
    generate_pairs,
    request_seed,
)
from alignez_gguf.pairs import PairStore, PreferencePair, unweighted
from alignez_gguf.pipeline.embeddings import Embeddings, Place, Readings
from alignez_gguf.pipeline.job import Job
from alignez_gguf.pipeline.kept import kept_array, kept_arrays, kept_json, known_margins
from alignez_gguf.scope import Scope
from alignez_gguf.scoring import ANSWER_TOKENS, NO_LIMITS, Divergence, Limits, Scorer, SteeredModel, Steering


def self_generated_pairs(job: Job, queries: Sequence[str]) -> list[PreferencePair]:
    """Pairs for all queries, in their order."""
    if not queries:
        return []
    settings = job.settings
    path = job.work.part("pairs", **_determining_texts(job)).with_suffix(".jsonl")
    total = len(queries) * settings.samples
    with PairStore(path) as store, job.reporter.stage("generating pairs", total) as advance:
        return generate_pairs(
            job.generator,
            queries,
            job.templates,
            store,
            sampling=_sampling(job),
            seed=settings.seed,
            samples=settings.samples,
            advance=advance,
        )


def given_pairs(job: Job, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Pairs that were not written by the model, with the characteristics that it names for their queries."""
    seen: Counter[str] = Counter()
    numbered = []
    for pair in pairs:
        query, helpful, harmful = pair.query.strip(), pair.helpful.strip(), pair.harmful.strip()
        numbered.append(replace(pair, query=query, helpful=helpful, harmful=harmful, sample=seen[query]))
        seen[query] += 1
    missing = [
        (pair.query, pair.sample)
        for pair in numbered
        if not (pair.helpful_characteristics or pair.harmful_characteristics)
    ]
    personas = (job.templates.helpful, job.templates.harmful)
    if not missing or not any(persona.uses_characteristics for persona in personas):
        return numbered
    path = job.work.part("characteristics", keys=missing, **_determining_texts(job)).with_suffix(".json")

    def asked() -> list[tuple[str, str]]:
        with job.reporter.stage("asking for characteristics", None):
            return characteristics(job.generator, missing, job.templates, _sampling(job), job.settings.seed)

    traits = dict(zip(missing, kept_json(path, asked), strict=True))
    described = []
    for pair in numbered:
        helpful, harmful = traits.get(
            (pair.query, pair.sample), (pair.helpful_characteristics, pair.harmful_characteristics)
        )
        described.append(replace(pair, helpful_characteristics=helpful, harmful_characteristics=harmful))
    return described


def usable_pairs(
    job: Job,
    generated: Sequence[PreferencePair],
    given: Sequence[PreferencePair],
    places: Sequence[Place] = (),
) -> tuple[list[PreferencePair], PairFilterReport]:
    """The pairs that say something; those that the model wrote are also held against its own likelihoods.

    What will be asked for at some of these places is read on the way, where it lies in the same texts.
    """
    margins = np.full((len(generated) + len(given), 2), np.nan)
    measured = [index for index, pair in enumerate(generated) if text_fault(pair) is None]
    margins[measured] = _margins(job, [generated[index] for index in measured], places)
    kept, report = filter_pairs([*generated, *given], margins)
    job.reporter.note(str(report))
    return kept, report


def _margins(job: Job, pairs: Sequence[PreferencePair], places: Sequence[Place]) -> NDArray[np.float64]:
    """How well the answers fit their personas, [n_pairs, 2]; each pair is kept as soon as it is measured."""
    asked = unweighted(pairs)
    if not asked:
        return np.empty((0, 2))
    path = job.work.part(
        "margins",
        model=job.engine.info,
        templates=job.templates,
        pair=[one.name for one in fields(PreferencePair)],  # others than of an earlier version are not read
    ).with_suffix(".jsonl")
    with known_margins(path) as known:
        missing = [pair for pair in asked if pair not in known]
        if missing:
            with job.reporter.stage("comparing personas", len(asked)) as advance:
                advance(len(asked) - len(missing))
                in_prompts = Readings.opened(job, [place for place in places if place.in_prompt])
                compared = compare_personas(job.engine, missing, job.templates, in_prompts.readouts)
                for pair, found in zip(missing, compared, strict=True):
                    for prompt, values in found.prompts.items():
                        in_prompts.keep(prompt, values)
                    known[pair] = found.margins
                    advance(1)
        return np.array([known[pair] for pair in asked])


@dataclass(frozen=True, eq=False)
class Fit:
    """What a method found, and the gap between the class means that it was found in."""

    directions: Directions
    class_gap: NDArray[np.float32]


def fit_directions(embeddings: Embeddings, method: str, place: Place, rank: int) -> Fit:
    """Fit a method on pairs as they are embedded at a place."""
    job, pairs = embeddings.job, embeddings.pairs
    path = job.work.part(
        "directions",
        model=job.engine.info,
        templates=job.templates,
        pairs=list(pairs),
        method=method,
        reading=place.reading,
        hook=place.hook,
        rank=rank,
        seed=job.settings.seed,
    ).with_suffix(".npz")

    def fitted() -> dict[str, Any]:
        helpful, harmful = embeddings.at(place)
        counts = np.array([pair.weight for pair in pairs])
        weights = None if len(np.unique(counts)) <= 1 else counts
        with job.reporter.stage(f"fitting directions ({method}, {place})", None):
            found = directions.fit(
                method, helpful, harmful, rank=rank, seed=job.settings.seed, weights=weights
            )
            arrays = {field.name: getattr(found, field.name) for field in fields(found)}
            arrays["class_gap"] = class_gap(helpful, harmful, weights)
        return {name: array for name, array in arrays.items() if array is not None}

    found: dict[str, Any] = kept_arrays(path, fitted)
    gap = found.pop("class_gap")
    return Fit(Directions(**{**found, "method": str(found["method"])}), gap)


@dataclass(frozen=True)
class BaseAnswer:
    """An answer of the base model to a plain query."""

    text: str
    n_tokens: int


def base_answers(job: Job, pairs: Sequence[PreferencePair]) -> list[BaseAnswer]:
    """The target's own answers, along which fluency is guarded."""
    target = job.target
    queries = [pair.query for pair in pairs]
    path = job.work.part(
        "answers", model=target.info, templates=job.templates, queries=queries, seed=job.settings.seed
    ).with_suffix(".json")

    def answered_plainly() -> list[dict[str, Any]]:
        sampling = Sampling(max_tokens=ANSWER_TOKENS, stop=job.templates.stop)
        requests = [
            GenerationRequest(
                job.templates.plain_prompt(query), request_seed(job.settings.seed, query, "plain")
            )
            for query in queries
        ]
        answers = [BaseAnswer("", 0)] * len(requests)
        with job.reporter.stage("answering plainly", len(requests)) as advance:
            for index, completion in target.generate(requests, sampling):
                answers[index] = BaseAnswer(completion.text, completion.n_tokens)
                advance(1)
        return [asdict(answer) for answer in answers]

    return [BaseAnswer(**row) for row in kept_json(path, answered_plainly)]


@contextmanager
def scorers(job: Job, pairs: Sequence[PreferencePair]) -> Iterator[Callable[[Scope], Scorer]]:
    """What scores edits of the target over the queries of `pairs`, one for each query, under any scope."""
    target = job.target
    base = base_answers(job, pairs)
    plain = [job.templates.plain_prompt(pair.query) for pair in pairs]
    with ExitStack() as opened:
        model = _OnDemand(
            lambda: opened.enter_context(
                target.steered_prompts(
                    plain,
                    [answer.text for answer in base],
                    [job.templates.continued(pair.helpful) for pair in pairs],
                )
            )
        )
        p_helpful, p_harmful = _persona_probabilities(job, pairs)

        def scorer(scope: Scope) -> Scorer:
            path = job.work.part(
                "base", model=target.info, templates=job.templates, queries=plain, scope=scope
            ).with_suffix(".npy")
            base_logprobs = kept_array(
                path, lambda: model.first_token_logprobs([Steering({})], scope=scope)[0]
            )
            return Scorer(model, scope, p_helpful, p_harmful, base_logprobs)

        yield scorer


def _persona_probabilities(
    job: Job, pairs: Sequence[PreferencePair]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How likely each first token is under the helpful and under the harmful persona, [n_pairs, n_vocab]."""
    path = job.work.part(
        "personas", model=job.target.info, templates=job.templates, pairs=unweighted(pairs)
    ).with_suffix(".npz")

    def measured() -> dict[str, NDArray[np.float32]]:
        asked = [prompt for pair in pairs for prompt in answer_prompts(job.templates, pair)]
        personas = []
        with job.reporter.stage("asking the personas", len(asked)) as advance:
            for logprobs in job.target.next_token_logprobs(asked):
                personas.append(np.exp(logprobs))
                advance(1)
        return {"helpful": np.stack(personas[0::2]), "harmful": np.stack(personas[1::2])}

    stored = kept_arrays(path, measured)
    return stored["helpful"], stored["harmful"]


class _OnDemand:
    """A steered model that is only made when it is asked something."""

    def __init__(self, make: Callable[[], SteeredModel]) -> None:
        self._make = make
        self._made: SteeredModel | None = None

    def _model(self) -> SteeredModel:
        if self._made is None:
            self._made = self._make()
        return self._made

    def first_token_logprobs(self, steerings: Sequence[Steering], *, scope: Scope) -> NDArray[np.float32]:
        return self._model().first_token_logprobs(steerings, scope=scope)

    def divergence(self, edits: Edits, limits: Limits = NO_LIMITS, *, scope: Scope) -> Divergence:
        return self._model().divergence(edits, limits, scope=scope)


def persona_divergence(job: Job, pairs: Sequence[PreferencePair]) -> float:
    """KL(P_base || P_persona) per token along the base model's answers, where the helpful persona is asked.

    Its estimate from those very answers, which are draws of P_base: the mean of log P_base - log P_persona.
    """
    base = base_answers(job, pairs)
    path = job.work.part(
        "persona-divergence",
        model=job.target.info,
        templates=job.templates,
        pairs=unweighted(pairs),
        seed=job.settings.seed,
    ).with_suffix(".npy")
    return float(kept_array(path, lambda: np.array(_persona_divergence(job, pairs, base))))


def _persona_divergence(job: Job, pairs: Sequence[PreferencePair], base: Sequence[BaseAnswer]) -> float:
    asked = [
        (pair, answer) for pair, answer in zip(pairs, base, strict=True) if answer.n_tokens and answer.text
    ]
    passages = []
    for pair, answer in asked:
        passages.append(Passage(job.templates.plain_prompt(pair.query), answer.text))
        passages.append(Passage(answer_prompts(job.templates, pair)[0], answer.text))
    logprobs = np.fromiter(job.target.response_logprobs(passages), np.float64).reshape(-1, 2)
    return float((logprobs[:, 0] - logprobs[:, 1]).sum() / max(sum(a.n_tokens for _, a in asked), 1))


def _determining_texts(job: Job) -> dict[str, Any]:
    """What decides the texts that the generator writes."""
    generator = job.generator
    return {
        "model": job.engine.info,
        "generator": None if generator is job.engine else getattr(generator, "info", generator),
        "templates": job.templates,
        "sampling": _sampling(job),
        "seed": job.settings.seed,
    }


def _sampling(job: Job) -> Sampling:
    sampling = default_sampling(job.templates)
    limit = job.settings.max_tokens
    return sampling if limit is None else replace(sampling, max_tokens=limit)
