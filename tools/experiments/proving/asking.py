"""What a real model says to queries that no fit has seen: as it is, steered, and asked as a persona."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import edits_sha256
from alignez_gguf.engines.base import Sampling
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import QueryError
from alignez_gguf.evaluation.answers import Answer, answer_queries, persona_prompts
from alignez_gguf.evaluation.fluency import Fluency, FluencyRule
from alignez_gguf.evaluation.queries import EvaluationQuery, overlap
from alignez_gguf.evaluation.results import BASE, PERSONA, STEERED
from alignez_gguf.evaluation.run import fluency_of, fluency_rule
from alignez_gguf.pairs.query_hash import query_hash
from alignez_gguf.progress import Reporter
from alignez_gguf.prompts.datasets import load_dataset_rows
from alignez_gguf.prompts.queries import load_queries
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.storage.rows import ResultStore
from alignez_gguf.storage.workdir import WorkDirectory
from alignez_gguf.text.refusal import explain_refusal

SAFE, UNSAFE, JAILBREAK = SETS = ("XSTest safe", "XSTest unsafe", "JailbreakBench")
SYSTEMS = (BASE, STEERED, PERSONA)
MAX_TOKENS = 40
"""The beginning of an answer says whether it declines."""

_SEED = 0
"""It decides nothing where the answers are greedy."""


@dataclass(frozen=True)
class HeldOut:
    """A query of one of the published sets that no fit has seen."""

    set: str
    query: str
    harmful: bool


@dataclass(frozen=True)
class Said:
    """The answer of one system to one query, and what is counted of it.

    Attributes:
        ended: whether the answer came to an end by itself.
        refuses: the rule by which it counts as a refusal; None where it does not refuse.
        fluent: whether it reads well.
        nat_per_token: mean negative log-likelihood under the base model; None for an empty answer.
        repetition: share of three-word sequences that occurred before.
    """

    set: str
    query: str
    harmful: bool
    system: str
    answer: str
    ended: bool
    refuses: str | None
    fluent: bool
    nat_per_token: float | None
    repetition: float


@dataclass(frozen=True)
class Measured:
    """Answers to the held-out queries, in order, and how well they are formed."""

    answers: Sequence[Answer]
    fluency: Sequence[Fluency]


def held_out(data: Path | None, fit: str, templates: Sequence[Templates], per_set: int) -> list[HeldOut]:
    """At most `per_set` queries of each set, those of the fit and of the templates left out.

    The order is that of the hashes of the queries: a larger sample holds a smaller one.

    Args:
        data: a folder with the sets; None asks the Hugging Face Hub for them.

    Raises:
        QueryError: a set cannot be had, or is empty.
    """
    seen = {query_hash(query) for query in load_queries(fit)}
    for one in templates:
        seen |= {query_hash(query) for twin in one.twins for query in twin}
        for persona in (one.helpful, one.harmful):
            seen |= {query_hash(query) for query, _ in persona.demonstrations}
    found: dict[str, list[HeldOut]] = {name: [] for name in SETS}
    for source in ("xstest", "jailbreakbench"):
        for row in load_dataset_rows(source if data is None else f"{source}={data}"):
            if query_hash(row.query) not in seen:
                name = JAILBREAK if source == "jailbreakbench" else UNSAFE if row.harmful else SAFE
                found[name].append(HeldOut(name, row.query, name != SAFE))
    empty = [name for name in SETS if not found[name]]
    if empty:
        raise QueryError(f"no query of {', '.join(empty)} is left; give a folder with all of the sets")
    return [
        one for name in SETS for one in sorted(found[name], key=lambda one: query_hash(one.query))[:per_set]
    ]


def require_unseen(control: ControlFile, queries: Sequence[HeldOut]) -> None:
    """Raise `QueryError` unless the control file says that it was made without these queries."""
    found = overlap(control, [EvaluationQuery(one.query, one.harmful) for one in queries])
    if not found.known or found.queries:
        raise QueryError(f"the answers would prove nothing; overlap of fit and held-out queries: {found}")


def ask(
    system: str,
    engine: LlamaEngine,
    templates: Templates,
    queries: Sequence[HeldOut],
    work: WorkDirectory,
    reporter: Reporter,
    control: ControlFile | None = None,
    temperature: float = 0.0,
) -> Measured:
    """The answers of a system to all queries; those that `work` holds are not generated again."""
    texts = [one.query for one in queries]
    plain = [templates.plain_prompt(text) for text in texts]
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=temperature, stop=templates.stop)
    determined_by = {"model": engine.info, "sampling": sampling}
    if control is not None:
        engine.set_edits(control.edits, control.scope, control.gate)
        determined_by |= {"edits": edits_sha256(control.edits, control.gate), "scope": str(control.scope)}
    with ResultStore(work.part(f"answers-{system}", **determined_by).with_suffix(".jsonl")) as store:
        prompts = plain
        if system == PERSONA:
            with reporter.stage("asking for characteristics", len(texts)) as advance:
                prompts = persona_prompts(
                    engine, texts, templates, sampling, store, seed=_SEED, advance=advance
                )
        with reporter.stage(f"answering ({system})", len(texts)) as advance:
            strength = 0.0 if control is None else 1.0
            answers = answer_queries(
                engine, prompts, texts, sampling, store, seed=_SEED, strength=strength, advance=advance
            )
    return Measured(answers, fluency_of(engine, system, templates, plain, answers, work, reporter))


def opens(
    engine: LlamaEngine,
    templates: Templates,
    queries: Sequence[HeldOut],
    control: ControlFile,
    work: WorkDirectory,
) -> dict[str, int] | None:
    """For how many queries of each set the gate opens; kept. None where the control has none."""
    gate = control.gate
    if gate is None:
        return None
    prompts = [templates.plain_prompt(one.query) for one in queries]
    found = work.cached_json(
        "opens",
        lambda: [gate.opens(row) for row in engine.next_token_logprobs(prompts)],
        model=engine.info,
        prompts=prompts,
        gate=gate.digest,
    )
    counts = dict.fromkeys(SETS, 0)
    for one, is_open in zip(queries, found, strict=True):
        counts[one.set] += is_open
    return counts


def rule_of(
    engine: LlamaEngine,
    templates: Templates,
    queries: Sequence[HeldOut],
    base: Measured,
    work: WorkDirectory,
    reporter: Reporter,
) -> FluencyRule:
    """What reads well, by the base model's own answers."""
    plain = [templates.plain_prompt(one.query) for one in queries]
    return fluency_rule(engine, templates, plain, base.answers, base.fluency, work, reporter)


def judge(queries: Sequence[HeldOut], measured: Mapping[str, Measured], rule: FluencyRule) -> list[Said]:
    """All answers of all systems, with what is counted of each."""

    def said(system: str, held: HeldOut, answer: Answer, fluency: Fluency) -> Said:
        refusal = explain_refusal(answer.text, held.query)
        return Said(
            set=held.set,
            query=held.query,
            harmful=held.harmful,
            system=system,
            answer=answer.text,
            ended=answer.clean_stop,
            refuses=None if refusal is None else str(refusal),
            fluent=rule.reads_well(answer.text, fluency),
            nat_per_token=fluency.nat_per_token,
            repetition=fluency.repetition,
        )

    return [
        said(system, *row)
        for system in SYSTEMS
        if system in measured
        for row in zip(queries, measured[system].answers, measured[system].fluency, strict=True)
    ]
