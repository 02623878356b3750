"""Self-generated preference pairs: the model answers each query as a helpful and as a harmful persona.

First it is asked for the characteristics of such an answer, then for an answer with them (AlignEZ, section
3.1). Works with any engine that can generate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from alignez_gguf.engines import Engine, GenerationRequest, Sampling
from alignez_gguf.pairs import PairStore, PreferencePair
from alignez_gguf.prompts import Persona, Templates

CHARACTERISTICS_TOKENS = 50
ANSWER_TOKENS = 200
_TEMPERATURE, _TOP_P = 0.8, 0.95

_CHUNK = 64
"""Queries that are worked on at a time: enough to keep a batch full, few enough to lose little in a crash."""


def default_sampling(templates: Templates) -> Sampling:
    """How answers are sampled: up to 200 tokens, as in the paper."""
    return Sampling(
        max_tokens=ANSWER_TOKENS, temperature=_TEMPERATURE, top_p=_TOP_P, stop=tuple(templates.stop)
    )


def request_seed(seed: int, query: str, *role: str) -> int:
    """A seed of 32 bits for one request, which depends on nothing but what is asked."""
    text = "\x1f".join((str(seed), query, *role))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "little")


def generate_pairs(
    engine: Engine,
    queries: Sequence[str],
    templates: Templates,
    store: PairStore,
    *,
    sampling: Sampling,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[PreferencePair]:
    """Generate the pairs that `store` does not have yet, and return all of them in the order of `queries`.

    Args:
        engine: answers the prompts.
        queries: without repetitions.
        templates: how the personas are asked.
        store: gets each pair as soon as it is complete.
        sampling: of the answers; the characteristics use the same with at most 50 tokens.
        seed: with the query it decides every answer, whatever the batch.
        advance: told how many more pairs are complete.

    Raises:
        QueryError: a query is too long for the context.
    """
    done = {pair.query: pair for pair in store}
    missing = [query for query in queries if query not in done]
    advance(len(queries) - len(missing))
    for start in range(0, len(missing), _CHUNK):
        chunk = missing[start : start + _CHUNK]
        for pair in _pairs(engine, chunk, templates, sampling, seed):
            store.append(pair)
            done[pair.query] = pair
            advance(1)
    return [done[query] for query in queries]


def _pairs(
    engine: Engine, queries: Sequence[str], templates: Templates, sampling: Sampling, seed: int
) -> list[PreferencePair]:
    personas = {"helpful": templates.helpful, "harmful": templates.harmful}
    asked = [(query, name, persona) for query in queries for name, persona in personas.items()]

    traits = _answers(
        engine,
        [
            GenerationRequest(
                templates.characteristics_prompt(persona, query),
                request_seed(seed, query, name, "characteristics"),
            )
            for query, name, persona in asked
        ],
        replace(sampling, max_tokens=min(CHARACTERISTICS_TOKENS, sampling.max_tokens)),
    )
    characteristics = [_one_line(text) for text, _ in traits]
    answers = _answers(
        engine,
        [
            GenerationRequest(
                templates.answer_prompt(persona, query, trait), request_seed(seed, query, name, "answer")
            )
            for (query, name, persona), trait in zip(asked, characteristics, strict=True)
        ],
        sampling,
    )
    return [
        PreferencePair(
            query=query,
            helpful=answers[2 * index][0].strip(),
            harmful=answers[2 * index + 1][0].strip(),
            helpful_characteristics=characteristics[2 * index],
            harmful_characteristics=characteristics[2 * index + 1],
            truncated=answers[2 * index][1] or answers[2 * index + 1][1],
        )
        for index, query in enumerate(queries)
    ]


def _answers(
    engine: Engine, requests: Sequence[GenerationRequest], sampling: Sampling
) -> list[tuple[str, bool]]:
    """Text, and whether it was cut at the limit of tokens, in the order of `requests`."""
    answers: list[tuple[str, bool]] = [("", False)] * len(requests)
    for index, completion in engine.generate(requests, sampling):
        answers[index] = (completion.text, completion.finish_reason == "length")
    return answers


def _one_line(characteristics: str) -> str:
    """The characteristics as they fit into a sentence that goes on after them."""
    return " ".join(characteristics.split()).rstrip(".")


def answer_prompts(templates: Templates, pair: PreferencePair) -> tuple[str, str]:
    """The prompts under which the helpful and the harmful answer were given."""

    def prompt(persona: Persona, characteristics: str) -> str:
        return templates.answer_prompt(persona, pair.query, characteristics)

    return (
        prompt(templates.helpful, pair.helpful_characteristics),
        prompt(templates.harmful, pair.harmful_characteristics),
    )


def answered_prompts(templates: Templates, pair: PreferencePair) -> tuple[str, str]:
    """The plain query with the helpful and with the harmful answer."""
    plain = templates.plain_prompt(pair.query)
    return f"{plain} {pair.helpful}", f"{plain} {pair.harmful}"
