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
from alignez_gguf.control.edits import Edits
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.scope import GENERATION, Scope
from alignez_gguf.directions.base import Directions
from alignez_gguf.directions.gap import class_gap
from alignez_gguf.engines.base import GenerationRequest, Passage, Sampling
from alignez_gguf.pairs.filters import PairFilterReport, filter_pairs, text_fault
from alignez_gguf.pairs.generation import (
    answer_prompts,
    answered,
    characteristics,
    compare_personas,
    default_sampling,
    generate_pairs,
    request_seed,
)
from alignez_gguf.pairs.pairs import PairStore, PreferencePair, unweighted
from alignez_gguf.pipeline.embeddings import ActivationCache, ActivationSite, Embeddings
from alignez_gguf.pipeline.job import Job
from alignez_gguf.pipeline.score_cache import margin_cache
from alignez_gguf.pipeline.verdicts import alternating, declines
from alignez_gguf.selection.scoring import ANSWER_TOKENS, EditScore, Scorer, SteeredModel


def self_generated_pairs(job: Job, queries: Sequence[str]) -> list[PreferencePair]:
    """Pairs for all queries, in their order."""
    if not queries:
        return []
    settings = job.settings
    path = job.work.part("pairs", **_text_inputs(job)).with_suffix(".jsonl")
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

    def ask() -> list[tuple[str, str]]:
        with job.reporter.stage("asking for characteristics", None):
            return characteristics(job.generator, missing, job.templates, _sampling(job), job.settings.seed)

    answers = job.work.cached_json("characteristics", ask, keys=missing, **_text_inputs(job))
    traits = dict(zip(missing, answers, strict=True))
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
    sites: Sequence[ActivationSite] = (),
) -> tuple[list[PreferencePair], PairFilterReport]:
    """The pairs that say something; those that the model wrote are also held against its own likelihoods.

    What will be asked for at some of these places is read on the way, where it lies in the same texts.
    """
    margins = np.full((len(generated) + len(given), 2), np.nan)
    measured = [index for index, pair in enumerate(generated) if text_fault(pair) is None]
    margins[measured] = _margins(job, [generated[index] for index in measured], sites)
    kept, report = filter_pairs([*generated, *given], margins)
    job.reporter.note(str(report))
    return kept, report


def _margins(
    job: Job, pairs: Sequence[PreferencePair], sites: Sequence[ActivationSite]
) -> NDArray[np.float64]:
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
    with margin_cache(path) as known:
        missing = [pair for pair in asked if pair not in known]
        if missing:
            with job.reporter.stage("comparing personas", len(asked)) as advance:
                advance(len(asked) - len(missing))
                prompt_cache = ActivationCache.open(job, [site for site in sites if site.in_prompt])
                compared = compare_personas(job.engine, missing, job.templates, prompt_cache.readouts)
                for pair, found in zip(missing, compared, strict=True):
                    for prompt, values in found.prompts.items():
                        prompt_cache.keep(prompt, values)
                    known[pair] = found.margins
                    advance(1)
        return np.array([known[pair] for pair in asked])


@dataclass(frozen=True, eq=False)
class DirectionFit:
    """What a method found, and the gap between the class means that it was found in."""

    directions: Directions
    class_gap: NDArray[np.float32]


def fit_directions(embeddings: Embeddings, method: str, site: ActivationSite, rank: int) -> DirectionFit:
    """Fit a method on the activations of pairs at a site; cached."""
    job, pairs = embeddings.job, embeddings.pairs

    def fit() -> dict[str, Any]:
        helpful, harmful = embeddings.at(site)
        weights = _weights(pairs, site)
        with job.reporter.stage(f"fitting directions ({method}, {site})", None):
            fitted = directions.fit(
                method, helpful, harmful, rank=rank, seed=job.settings.seed, weights=weights
            )
            arrays = {field.name: getattr(fitted, field.name) for field in fields(fitted)}
            arrays["class_gap"] = class_gap(helpful, harmful, weights)
        return {name: array for name, array in arrays.items() if array is not None}

    arrays: dict[str, Any] = job.work.cached_arrays(
        "directions",
        fit,
        model=job.engine.info,
        templates=job.templates,
        pairs=list(pairs),
        method=method,
        reading=site.reading,
        hook=site.hook,
        rank=rank,
        seed=job.settings.seed,
    )
    gap = arrays.pop("class_gap")
    return DirectionFit(Directions(**{**arrays, "method": str(arrays["method"])}), gap)


def _weights(pairs: Sequence[PreferencePair], site: ActivationSite) -> NDArray[np.float64] | None:
    """How much each row of a contrast counts; None where all count alike."""
    if site.contrasts_verdicts:
        return None
    weights = np.array([pair.weight for pair in pairs])
    return None if len(np.unique(weights)) <= 1 else weights


@dataclass(frozen=True)
class BaseAnswer:
    """An answer of the base model to a plain query."""

    text: str
    n_tokens: int


def base_answers(job: Job, pairs: Sequence[PreferencePair]) -> list[BaseAnswer]:
    """Return the target's own sampled answers to the plain queries of `pairs`, in their order; cached.

    The cost of an edit, KL(P_base || P_steered), is estimated along these answers.
    """
    if not pairs:
        return []
    queries = [pair.query for pair in pairs]
    rows = job.work.cached_json(
        "answers",
        lambda: [asdict(answer) for answer in _answer_plainly(job, queries)],
        model=job.target.info,
        templates=job.templates,
        queries=queries,
        seed=job.settings.seed,
    )
    return [BaseAnswer(**row) for row in rows]


def _answer_plainly(job: Job, queries: Sequence[str]) -> list[BaseAnswer]:
    """Sample an answer of the unsteered target to each query."""
    sampling = Sampling(max_tokens=ANSWER_TOKENS, stop=job.templates.stop)
    requests = [
        GenerationRequest(job.templates.plain_prompt(query), request_seed(job.settings.seed, query, "plain"))
        for query in queries
    ]
    answers = [BaseAnswer("", 0)] * len(requests)
    with job.reporter.stage("answering plainly", len(requests)) as advance:
        for index, completion in job.target.generate(requests, sampling):
            answers[index] = BaseAnswer(completion.text, completion.n_tokens)
            advance(1)
    return answers


@contextmanager
def open_scorer(job: Job, pairs: Sequence[PreferencePair], gate: Gate | None = None) -> Iterator[Scorer]:
    """Open a scorer of edits of the target over the queries of `pairs`.

    The target is loaded for steering when the first edit is scored, and closed with the context.

    Args:
        pairs: one per query; the scorer's queries come in the order of `verdicts.alternating`.
        gate: edits act on the prompts for which it opens; None means on all.
    """
    pairs = alternating(pairs)
    passages = [answered(job.templates, pair)[0] for pair in pairs]
    complied = [pair for pair in pairs if not declines(pair)]
    own = [
        (Passage(job.templates.plain_prompt(pair.query), answer.text), answer)
        for pair, answer in zip(complied, base_answers(job, complied), strict=True)
        if answer.n_tokens and answer.text
    ]
    passages += [passage for passage, _ in own]
    opens = _opens(job, [passage.prompt for passage in passages], gate)
    with ExitStack() as stack:
        model = _LazySteeredModel(lambda: stack.enter_context(job.target.steered(passages)))

        def measure_base() -> NDArray[np.float64]:
            with job.reporter.stage("measuring the base model", None):
                return model.log_likelihoods({}, range(len(passages)), scope=GENERATION)

        yield Scorer(
            model,
            tuple(map(declines, pairs)),
            tuple(answer.n_tokens for _, answer in own),
            job.work.cached_array("base", measure_base, model=job.target.info, passages=passages),
            opens,
        )


def _opens(job: Job, prompts: Sequence[str], gate: Gate | None) -> tuple[bool, ...]:
    """Return whether the gate opens for each prompt; cached. Without a gate all are open."""
    if gate is None:
        return (True,) * len(prompts)

    def ask_gate() -> list[bool]:
        unique = list(dict.fromkeys(prompts))
        opens = map(gate.opens, job.target.next_token_logprobs(unique))
        by_prompt = dict(zip(unique, opens, strict=True))
        return [by_prompt[prompt] for prompt in prompts]

    opens = job.work.cached_json("opens", ask_gate, model=job.target.info, prompts=prompts, gate=gate.digest)
    return tuple(opens)


class _LazySteeredModel:
    """A `SteeredModel` that is loaded when the first likelihood is asked for."""

    def __init__(self, load: Callable[[], SteeredModel]) -> None:
        self._load = load
        self._model: SteeredModel | None = None

    def log_likelihoods(self, edits: Edits, passages: Sequence[int], *, scope: Scope) -> NDArray[np.float64]:
        if self._model is None:
            self._model = self._load()
        return self._model.log_likelihoods(edits, passages, scope=scope)


def persona_score(job: Job, pairs: Sequence[PreferencePair], scorer: Scorer) -> EditScore:
    """Score the safety-first persona itself, as a prompt: its gains are the distances, its cost a KL; cached.

    Args:
        pairs: those of the scorer.
    """
    pairs = alternating(pairs)

    def measure() -> NDArray[np.float64]:
        passages = [
            Passage(answer_prompts(job.templates, pair)[0], job.templates.continued(pair.helpful))
            for pair in pairs
        ]
        logprobs = []
        with job.reporter.stage("asking the safety-first persona", len(passages)) as advance:
            for logprob in job.target.response_logprobs(passages, max_tokens=ANSWER_TOKENS):
                logprobs.append(logprob)
                advance(1)
        return np.array(logprobs)

    logprobs = job.work.cached_array(
        "distances", measure, model=job.target.info, templates=job.templates, pairs=unweighted(pairs)
    )
    distances = logprobs - scorer.base[: len(pairs)]
    complied = [pair for pair in pairs if not declines(pair)]
    return EditScore(tuple(distances.tolist()), scorer.declined, persona_divergence(job, complied))


def persona_divergence(job: Job, pairs: Sequence[PreferencePair]) -> float:
    """Estimate KL(P_base || P_persona) of the helpful persona, in nat per token; cached.

    The estimate is the mean of log P_base - log P_persona over the base model's own answers, which are draws
    of P_base.
    """
    if not pairs:
        return 0.0
    base = base_answers(job, pairs)
    divergence = job.work.cached_array(
        "persona-divergence",
        lambda: np.array(_measure_persona_divergence(job, pairs, base)),
        model=job.target.info,
        templates=job.templates,
        pairs=unweighted(pairs),
        seed=job.settings.seed,
    )
    return float(divergence)


def _measure_persona_divergence(
    job: Job, pairs: Sequence[PreferencePair], base: Sequence[BaseAnswer]
) -> float:
    answered_pairs = [
        (pair, answer) for pair, answer in zip(pairs, base, strict=True) if answer.n_tokens and answer.text
    ]
    passages = []
    for pair, answer in answered_pairs:
        passages.append(Passage(job.templates.plain_prompt(pair.query), answer.text))
        passages.append(Passage(answer_prompts(job.templates, pair)[0], answer.text))
    logprobs = np.fromiter(job.target.response_logprobs(passages), np.float64).reshape(-1, 2)
    n_tokens = sum(answer.n_tokens for _, answer in answered_pairs)
    return float((logprobs[:, 0] - logprobs[:, 1]).sum() / max(n_tokens, 1))


def _text_inputs(job: Job) -> dict[str, Any]:
    """Return everything that determines the texts of the generator, by name."""
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
