"""The answers of the systems that are compared: the same queries, the same seeds, cached as they come.

The base model measures them too: how fluent they are, and whether they are about their queries.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np

from alignez_gguf.engines.base import Completion, GenerationRequest, Generator, Passage, Sampling
from alignez_gguf.evaluation.fluency import Fluency
from alignez_gguf.pairs.generation import CHARACTERISTICS_TOKENS, request_seed
from alignez_gguf.progress import Advance
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.storage.rows import ResultStore, key_of
from alignez_gguf.text.repetition import repetition

_ROLE = "evaluation"

TOPIC_TOKENS = 24
"""Topic is measured on this many tokens at the beginning of an answer."""
OTHER_QUERIES = 4
"""Number of queries besides its own under which an answer is measured."""


@dataclass(frozen=True)
class Answer:
    """The answer of a system to a query.

    Attributes:
        text: the answer, without spaces around it.
        clean_stop: whether it ended by itself, and not at the limit of tokens.
    """

    text: str
    clean_stop: bool


class LogprobEngine(Protocol):
    """A model that can say how likely a response is after a prompt."""

    def response_logprobs(
        self, passages: Sequence[Passage], *, max_tokens: int | None = None
    ) -> Iterator[float]: ...


def answer_queries(
    engine: Generator,
    prompts: Sequence[str],
    queries: Sequence[str],
    sampling: Sampling,
    store: ResultStore,
    *,
    seed: int,
    strength: float = 0.0,
    advance: Advance,
) -> list[Answer]:
    """Answer all prompts, in order; answers in `store` are not generated again.

    The seed of an answer depends on `seed` and its query alone, so that all systems draw alike.

    Args:
        engine: generates the answers.
        prompts: the texts that the engine completes.
        queries: the query of each prompt; it seeds the answer.
        sampling: how tokens are drawn.
        store: caches the answers.
        seed: the seed of the evaluation.
        strength: the strength of the edits that the engine has.
        advance: called with the number of answers that were finished.

    Raises:
        QueryError: a prompt is too long for the context.
    """
    keys = [key_of(prompt, seed, strength) for prompt in prompts]
    missing = [index for index, key in enumerate(keys) if key not in store]
    advance(len(prompts) - len(missing))
    requests = [
        GenerationRequest(prompts[index], request_seed(seed, queries[index], _ROLE), strength)
        for index in missing
    ]
    completion: Completion
    for position, completion in engine.generate(requests, sampling):
        answer = Answer(completion.text.strip(), completion.finish_reason == "stop")
        store[keys[missing[position]]] = asdict(answer)
        advance(1)
    return [Answer(**store[key]) for key in keys]


def persona_prompts(
    engine: Generator,
    queries: Sequence[str],
    templates: Templates,
    sampling: Sampling,
    store: ResultStore,
    *,
    seed: int,
    advance: Advance,
) -> list[str]:
    """Return the prompts under which the base model answers as the safety-oriented persona.

    The model is first asked for the characteristics of a good answer, as when it writes the helpful side of
    its pairs (AlignEZ, section 3.1); the prompts ask it to answer with them.
    """
    if not templates.helpful.uses_characteristics:
        advance(len(queries))
        return [templates.answer_prompt(templates.helpful, query) for query in queries]
    prompts = [templates.characteristics_prompt(templates.helpful, query) for query in queries]
    short = replace(sampling, max_tokens=min(CHARACTERISTICS_TOKENS, sampling.max_tokens))
    traits = answer_queries(engine, prompts, queries, short, store, seed=seed, advance=advance)
    return [
        templates.answer_prompt(templates.helpful, query, " ".join(trait.text.split()).rstrip("."))
        for query, trait in zip(queries, traits, strict=True)
    ]


def measure_fluency(
    scorer: LogprobEngine,
    tokenize: Callable[[str], list[int]],
    prompts: Sequence[str],
    answers: Sequence[Answer],
    store: ResultStore,
    advance: Advance,
    *,
    continued: Callable[[str], str],
) -> list[Fluency]:
    """Measure how fluent the answers are, under the base model and its plain prompts, in order.

    Args:
        scorer: the base model.
        tokenize: splits a text into the tokens of that model.
        prompts: the plain prompt of each answer.
        answers: the answers of one system.
        store: caches the measurements.
        advance: called with the number of answers that were measured.
        continued: returns an answer as it follows its prompt; see `Templates.continued`.
    """
    keys = [key_of("surprise", prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
    missing = [index for index, key in enumerate(keys) if answers[index].text and key not in store]
    advance(len(answers) - len(missing))
    passages = [Passage(prompts[index], continued(answers[index].text)) for index in missing]
    for index, passage, logprob in zip(missing, passages, scorer.response_logprobs(passages), strict=True):
        n_tokens = max(1, len(tokenize(passage.text)) - len(tokenize(passage.prompt)))
        store[keys[index]] = {"nat_per_token": -logprob / n_tokens, "n_tokens": n_tokens}
        advance(1)
    return [
        Fluency(
            nat_per_token=store[key]["nat_per_token"] if answer.text else None,
            repetition=repetition(answer.text),
            clean_stop=answer.clean_stop,
            n_tokens=store[key]["n_tokens"] if answer.text else None,
        )
        for key, answer in zip(keys, answers, strict=True)
    ]


def measure_topic(
    scorer: LogprobEngine,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Answer]],
    store: ResultStore,
    *,
    seed: int,
    advance: Advance,
    continued: Callable[[str], str],
) -> dict[str, list[float | None]]:
    """Measure how much likelier each answer is under its own query than under others.

    The measure is log P(answer | query) - log mean P(answer | other query), over `OTHER_QUERIES` of the set,
    the same for all systems: the pointwise mutual information of answer and query, estimated by the base
    model. It is about 0 for an answer that would do for any query.

    Returns:
        The measure of every answer in nat, by system and in the order of the prompts; None for an empty
        answer, and where there is no other query.
    """
    other_prompts = _other_prompts(prompts, seed)
    needed = [
        (prompt, index, answer.text)
        for given in answers.values()
        for index, answer in enumerate(given)
        if answer.text and other_prompts[index]
        for prompt in (prompts[index], *other_prompts[index])
    ]
    # By prompt, so that what a prompt and the one before have in common is computed once.
    keys = {key_of("topic", prompt, text, TOPIC_TOKENS): (prompt, text) for prompt, _, text in sorted(needed)}
    missing = [key for key in keys if key not in store]
    advance(len(keys) - len(missing))
    passages = [Passage(prompt, continued(text)) for prompt, text in map(keys.__getitem__, missing)]
    logprobs = scorer.response_logprobs(passages, max_tokens=TOPIC_TOKENS)
    for key, logprob in zip(missing, logprobs, strict=True):
        store[key] = {"logprob": logprob}
        advance(1)

    def logprob_of(prompt: str, text: str) -> float:
        return float(store[key_of("topic", prompt, text, TOPIC_TOKENS)]["logprob"])

    def topic(index: int, text: str) -> float | None:
        if not text or not other_prompts[index]:
            return None
        elsewhere = np.array([logprob_of(prompt, text) for prompt in other_prompts[index]])
        return logprob_of(prompts[index], text) - float(
            np.logaddexp.reduce(elsewhere) - np.log(len(elsewhere))
        )

    return {
        name: [topic(index, answer.text) for index, answer in enumerate(given)]
        for name, given in answers.items()
    }


def n_topic_passages(prompts: Sequence[str], answers: Mapping[str, Sequence[Answer]]) -> int:
    """Return the greatest number of passages that `measure_topic` reads."""
    n_others = min(OTHER_QUERIES, len(prompts) - 1)
    return (1 + n_others) * sum(bool(answer.text) for given in answers.values() for answer in given)


def _other_prompts(prompts: Sequence[str], seed: int) -> list[list[str]]:
    """Draw a few of the other prompts for each prompt, by the seed and the prompt alone."""
    distinct = sorted(set(prompts))
    drawn = []
    for prompt in prompts:
        candidates = [other for other in distinct if other != prompt]
        rng = random.Random(f"{seed} {prompt}")
        drawn.append(rng.sample(candidates, min(OTHER_QUERIES, len(candidates))))
    return drawn
