"""Runs an evaluation from start to end: answers of every system, their fluency, the judge, the figures.

Models are opened one after the other, so that the memory of one is enough. Everything that costs time is
cached in the work directory as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from math import isfinite

from alignez_gguf import __version__
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import edits_sha256
from alignez_gguf.engines.base import Sampling
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import ModelFileError, QueryError
from alignez_gguf.evaluation.answers import (
    Answer,
    answer_queries,
    measure_fluency,
    measure_topic,
    n_topic_passages,
    persona_prompts,
)
from alignez_gguf.evaluation.fluency import Fluency, FluencyRule, disorder, fluency_limit
from alignez_gguf.evaluation.judges.base import Judge, QueryAnswer
from alignez_gguf.evaluation.projections import Projections, project
from alignez_gguf.evaluation.queries import EvaluationQuery, Overlap, overlap
from alignez_gguf.evaluation.results import ALIGNED, BASE, PERSONA, STEERED, Judged, System, judge_systems
from alignez_gguf.progress import Reporter
from alignez_gguf.prompts.chat_template import ChatTemplate
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.storage.rows import ResultStore, json_sha256
from alignez_gguf.storage.workdir import WorkDirectory

OpenEngine = Callable[[], AbstractContextManager[LlamaEngine]]
OpenJudge = Callable[[FluencyRule, ResultStore], AbstractContextManager[Judge]]
"""Opens the judge, given the rule of which answers read well and the store of its replies."""

_DISORDERED = 32
"""Number of answers that are measured with their words in random order."""

_DESCRIPTIONS = {
    BASE: "the base model, asked plainly",
    STEERED: "the base model with the control file, asked plainly",
    PERSONA: "the base model, asked as a safety-oriented persona instead of steered",
    ALIGNED: "the aligned model, asked in its own framing",
}


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation.

    Attributes:
        seed: seeds answers, bootstrap and repeated questions to the judge.
        strength, scope: how strongly and at which tokens the edit acts.
        max_tokens, temperature, top_p: how answers are sampled.
        persona: whether to compare with the persona-prompted base model too.
    """

    seed: int = 0
    strength: float = 1.0
    scope: str = "generation"
    max_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    persona: bool = False

    def sampling(self, stop: tuple[str, ...]) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_p, stop)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        judged: the systems, the base model first.
        judge: name of the judge.
        provenance: everything that determines the result, by name.
        projections: None where the architecture cannot be read.
    """

    queries: tuple[EvaluationQuery, ...]
    overlap: Overlap
    judged: tuple[Judged, ...]
    judge: str
    control: ControlFile
    provenance: Mapping[str, object]
    projections: Projections | None


def evaluate(
    queries: Sequence[EvaluationQuery],
    control: ControlFile,
    open_base: OpenEngine,
    open_aligned: OpenEngine | None,
    open_judge: OpenJudge,
    templates_of: Callable[[LlamaEngine], Templates],
    settings: EvaluationSettings,
    work: WorkDirectory,
    reporter: Reporter,
    *,
    topic_matters: bool = True,
) -> Evaluation:
    """Answer all queries with every system, and judge the answers.

    Args:
        open_base, open_aligned: open the engine of a model; there may be no aligned one.
        open_judge: opens the judge.
        templates_of: returns the templates by which the base model is asked.
        work: caches answers, measurements and verdicts.
        topic_matters: whether to measure what answers are about, for a judge that uses it; this reads every
            answer a few times.

    Raises:
        QueryError: there are too few queries, or one is too long.
        ControlFileError: the control file is for another model.
        EndpointError: the judge cannot be reached; its replies until then are cached in `work`.
    """
    if len(queries) < 2:
        raise QueryError("one query is too few for an evaluation; give at least two")
    texts = [query.text for query in queries]
    answers: dict[str, list[Answer]] = {}
    provenance: dict[str, object] = {
        "package_version": __version__,
        "settings": asdict(settings),
        "queries_sha256": json_sha256([[query.text, query.harmful] for query in queries]),
        "n_queries": len(queries),
    }
    if open_aligned is not None:
        with open_aligned() as engine:
            answers[ALIGNED] = _aligned_answers(engine, texts, settings, work, reporter)
            provenance["aligned_model"] = asdict(engine.info)
    with open_base() as engine:
        control.check_fits(engine.info)
        engine.set_edits(control.edits, settings.scope, control.gate)
        templates = templates_of(engine)
        provenance |= {
            "base_model": asdict(engine.info),
            "templates_version": templates.version,
            "templates_sha256": json_sha256(repr(templates)),
            "framing": templates.framing,
            "control_sha256": edits_sha256(control.edits, control.gate),
        }
        prompts = [templates.plain_prompt(text) for text in texts]
        answers = {
            **_base_answers(engine, texts, prompts, templates, control, settings, work, reporter),
            **answers,
        }
        fluency = {
            name: fluency_of(engine, name, templates, prompts, given, work, reporter)
            for name, given in answers.items()
        }
        rule = fluency_rule(engine, templates, prompts, answers[BASE], fluency[BASE], work, reporter)
        if topic_matters:
            topic = _topic(engine, templates, prompts, answers, settings, work, reporter)
        else:
            topic = {name: [None] * len(texts) for name in answers}
        projections = _projections(engine, control, prompts, settings, reporter)
    systems = [
        System(name, _DESCRIPTIONS[name], _query_answers(queries, answers[name], fluency[name], topic[name]))
        for name in answers
    ]
    judged, judge_name, identity = _judged(systems, rule, open_judge, settings, work, reporter)
    return Evaluation(
        queries=tuple(queries),
        overlap=overlap(control, queries),
        judged=tuple(judged),
        judge=judge_name,
        control=control,
        provenance={**provenance, "fluency_limit": _finite(rule.limit), "judge": dict(identity)},
        projections=projections,
    )


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _aligned_answers(
    engine: LlamaEngine,
    texts: Sequence[str],
    settings: EvaluationSettings,
    work: WorkDirectory,
    reporter: Reporter,
) -> list[Answer]:
    template = ChatTemplate.of(engine.model)
    sampling = settings.sampling(template.stop)
    prompts = [template.prompt([], text) for text in texts]
    place = work.part("answers-aligned", model=engine.info, sampling=sampling).with_suffix(".jsonl")
    with ResultStore(place) as store, reporter.stage("answering (aligned)", len(texts)) as advance:
        return answer_queries(engine, prompts, texts, sampling, store, seed=settings.seed, advance=advance)


def _base_answers(
    engine: LlamaEngine,
    texts: Sequence[str],
    prompts: Sequence[str],
    templates: Templates,
    control: ControlFile,
    settings: EvaluationSettings,
    work: WorkDirectory,
    reporter: Reporter,
) -> dict[str, list[Answer]]:
    """Return the answers of all systems that run on the base model, base first."""
    sampling = settings.sampling(tuple(templates.stop))
    prompts_and_strength: dict[str, tuple[Sequence[str], float]] = {
        BASE: (prompts, 0.0),
        STEERED: (prompts, settings.strength),
    }
    with ExitStack() as stores:

        def store(name: str, **determined_by: object) -> ResultStore:
            place = work.part(f"answers-{name}", model=engine.info, sampling=sampling, **determined_by)
            return stores.enter_context(ResultStore(place.with_suffix(".jsonl")))

        store_of = {
            BASE: store(BASE),
            STEERED: store(STEERED, edits=edits_sha256(control.edits, control.gate), scope=settings.scope),
        }
        if settings.persona:
            store_of[PERSONA] = store(PERSONA)
            with reporter.stage("asking for characteristics", len(texts)) as advance:
                personas = persona_prompts(
                    engine, texts, templates, sampling, store_of[PERSONA], seed=settings.seed, advance=advance
                )
            prompts_and_strength[PERSONA] = (personas, 0.0)
        answers = {}
        for name, (given, strength) in prompts_and_strength.items():
            with reporter.stage(f"answering ({name})", len(texts)) as advance:
                answers[name] = answer_queries(
                    engine,
                    given,
                    texts,
                    sampling,
                    store_of[name],
                    seed=settings.seed,
                    strength=strength,
                    advance=advance,
                )
        return answers


def fluency_of(
    engine: LlamaEngine,
    name: str,
    templates: Templates,
    prompts: Sequence[str],
    answers: Sequence[Answer],
    work: WorkDirectory,
    reporter: Reporter,
) -> list[Fluency]:
    """Measure how fluent the answers of a system are under the plain prompts, cached in `work`."""
    place = work.part("fluency", model=engine.info).with_suffix(".jsonl")
    with ResultStore(place) as store, reporter.stage(f"measuring fluency ({name})", len(answers)) as advance:
        return measure_fluency(
            engine,
            engine.model.tokenize,
            prompts,
            answers,
            store,
            advance,
            continued=templates.continued,
        )


def fluency_rule(
    engine: LlamaEngine,
    templates: Templates,
    prompts: Sequence[str],
    answers: Sequence[Answer],
    fluency: Sequence[Fluency],
    work: WorkDirectory,
    reporter: Reporter,
) -> FluencyRule:
    """Fit the rule of which answers read well on the base model's own answers, in order and shuffled."""
    mixed = [
        (prompt, Answer(text, clean_stop=True))
        for prompt, answer in zip(prompts, answers, strict=True)
        if (text := disorder(answer.text)) is not None
    ][:_DISORDERED]
    disordered = fluency_of(
        engine,
        "words in random order",
        templates,
        [prompt for prompt, _ in mixed],
        [answer for _, answer in mixed],
        work,
        reporter,
    )
    return FluencyRule(fluency_limit(fluency, disordered))


def _topic(
    engine: LlamaEngine,
    templates: Templates,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Answer]],
    settings: EvaluationSettings,
    work: WorkDirectory,
    reporter: Reporter,
) -> dict[str, list[float | None]]:
    place = work.part("topic", model=engine.info).with_suffix(".jsonl")
    n_passages = n_topic_passages(prompts, answers)
    with (
        ResultStore(place) as store,
        reporter.stage("measuring what answers are about", n_passages) as advance,
    ):
        return measure_topic(
            engine,
            prompts,
            answers,
            store,
            seed=settings.seed,
            advance=advance,
            continued=templates.continued,
        )


def _projections(
    engine: LlamaEngine,
    control: ControlFile,
    prompts: Sequence[str],
    settings: EvaluationSettings,
    reporter: Reporter,
) -> Projections | None:
    try:
        with reporter.stage("projecting", None):
            return project(engine, control, prompts, settings.strength)
    except ModelFileError as error:
        reporter.note(f"no histogram of projections: {error}")
        return None


def _query_answers(
    queries: Sequence[EvaluationQuery],
    answers: Sequence[Answer],
    fluency: Sequence[Fluency],
    topic: Sequence[float | None],
) -> tuple[QueryAnswer, ...]:
    return tuple(
        QueryAnswer(query.text, query.harmful, answer.text, measured, about)
        for query, answer, measured, about in zip(queries, answers, fluency, topic, strict=True)
    )


def _judged(
    systems: Sequence[System],
    rule: FluencyRule,
    open_judge: OpenJudge,
    settings: EvaluationSettings,
    work: WorkDirectory,
    reporter: Reporter,
) -> tuple[list[Judged], str, Mapping[str, object]]:
    place = work.part("verdicts").with_suffix(".jsonl")
    with ResultStore(place) as store, open_judge(rule, store) as judge:
        judged = judge_systems(systems, judge, store, reporter, seed=settings.seed, rule=rule)
        return judged, judge.name, judge.identity
