"""Generates preference pairs: the model answers each query as a helpful and as a harmful persona.

It is first asked for the characteristics of such an answer, then for an answer with them (AlignEZ, section
3.1). Any engine that can generate will do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alignez_gguf.engines.base import Engine, GenerationRequest, Generator, Passage, Sampling
from alignez_gguf.pairs.pairs import PairStore, PreferencePair
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.readout import Readout
from alignez_gguf.text.refusal import is_refusal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHARACTERISTICS_TOKENS = 50
_CHARACTERISTICS_TEMPERATURE = 0.3
"""Characteristics are an instruction of the model to itself: its likeliest wording is of more use."""
PAIR_ANSWER_TOKENS = 48
"""Maximum tokens per answer: its first sentences tell what it is; the paper has 200."""
_TEMPERATURE, _TOP_P = 0.8, 0.95

MARGIN_TOKENS = 12
"""Number of tokens at the beginning of an answer by which its persona is measured."""

_SENTENCE_END = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]")
"""With the quotation marks and brackets that close behind it; Chinese and Japanese need no space."""

_LIST_NUMBER = re.compile(r"(?:^|[\n:;.!?])\s*\d{1,3}\.$")
"""The number of the next item of a list, at the end of a text: its full stop ends no sentence."""

_CHUNK = 64
"""Number of queries whose characteristics are generated before their answers: enough to fill a batch."""


def default_sampling(templates: Templates) -> Sampling:
    """Return the default sampling of answers."""
    return Sampling(
        max_tokens=PAIR_ANSWER_TOKENS, temperature=_TEMPERATURE, top_p=_TOP_P, stop=tuple(templates.stop)
    )


def request_seed(seed: int, query: str, *role: str) -> int:
    """Derive the seed of a request, 32 bits, from `seed`, its query and its role alone."""
    text = "\x1f".join((str(seed), query, *role))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "little")


def generate_pairs(
    engine: Generator,
    queries: Sequence[str],
    templates: Templates,
    store: PairStore,
    *,
    sampling: Sampling,
    seed: int = 0,
    samples: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> list[PreferencePair]:
    """Generate the pairs that `store` does not have yet, and return all of them in the order of `queries`.

    An answer that was cut at the limit of tokens ends with its last whole sentence, if it has one.

    Args:
        engine: answers the prompts.
        queries: the queries, without repetitions.
        templates: the prompts of the personas.
        store: gets each pair as soon as it is complete.
        sampling: how answers are sampled; characteristics have at most 50 tokens.
        seed: decides every answer together with its query, whatever the batch.
        samples: number of pairs for each query.
        advance: called with the number of pairs that were completed.

    Raises:
        QueryError: a query is too long for the context.
    """
    done = {(pair.query, pair.sample): pair for pair in store}
    wanted = [(query, sample) for query in queries for sample in range(samples)]
    missing = [key for key in wanted if key not in done]
    advance(len(wanted) - len(missing))
    for start in range(0, len(missing), _CHUNK):
        for pair in _pairs(engine, missing[start : start + _CHUNK], templates, sampling, seed):
            store.append(pair)
            done[pair.query, pair.sample] = pair
            advance(1)
    return [done[key] for key in wanted]


def _pairs(
    engine: Generator,
    keys: Sequence[tuple[str, int]],
    templates: Templates,
    sampling: Sampling,
    seed: int,
) -> Iterator[PreferencePair]:
    """Yield the pairs as they are completed, in any order."""
    traits = characteristics(engine, keys, templates, sampling, seed)
    prompts = [
        prompt
        for (query, _), (helpful, harmful) in zip(keys, traits, strict=True)
        for prompt in _answer_prompts(templates, query, helpful, harmful)
    ]
    seeds = _seeds(keys, seed, "answer")
    answers: dict[int, tuple[str, bool]] = {}
    requests = [
        GenerationRequest(prompt, prompt_seed, keep_prompt=True)
        for prompt, prompt_seed in zip(prompts, seeds, strict=True)
    ]
    for index, answer in _answers(engine, requests, sampling):
        answers[index] = answer
        number = index // 2
        if not answers.keys() >= {2 * number, 2 * number + 1}:
            continue
        (query, sample), (helpful_traits, harmful_traits) = keys[number], traits[number]
        (helpful, helpful_cut), (harmful, harmful_cut) = answers[2 * number], answers[2 * number + 1]
        yield PreferencePair(
            query=query,
            helpful=helpful.strip(),
            harmful=harmful.strip(),
            helpful_characteristics=helpful_traits,
            harmful_characteristics=harmful_traits,
            truncated=helpful_cut or harmful_cut,
            sample=sample,
        )


def characteristics(
    engine: Generator,
    keys: Sequence[tuple[str, int]],
    templates: Templates,
    sampling: Sampling,
    seed: int,
) -> list[tuple[str, str]]:
    """Ask the model what a helpful and a harmful answer should be like, for each (query, sample).

    A persona's own traits stand in where the model names none: where it answers the query in a list, refuses,
    or says nothing.

    Returns:
        The characteristics of the helpful and of the harmful answer for every key; empty for a persona whose
        prompts do not use them.
    """
    personas = (templates.helpful, templates.harmful)
    prompts = [
        (index, templates.characteristics_prompt(persona, query))
        for index, (query, persona) in enumerate(
            (query, persona) for query, _ in keys for persona in personas
        )
        if persona.uses_characteristics
    ]
    seeds = _seeds(keys, seed, "characteristics")
    requests = [GenerationRequest(prompt, seeds[index]) for index, prompt in prompts]
    limited = replace(
        sampling,
        max_tokens=min(CHARACTERISTICS_TOKENS, sampling.max_tokens),
        temperature=min(_CHARACTERISTICS_TEMPERATURE, sampling.temperature),
    )
    traits = [""] * (2 * len(keys))
    for number, (text, _) in _answers(engine, requests, limited):
        index = prompts[number][0]
        own = personas[index % 2].traits
        traits[index] = own if own and not _describes_an_answer(text) else _one_line(text)
    return list(zip(traits[0::2], traits[1::2], strict=True))


def _describes_an_answer(text: str) -> bool:
    """Whether a text can be what an answer should be like: no list, no refusal, and not empty."""
    return bool(text.strip()) and not _LIST_ITEM.search(text) and not is_refusal(text)


def _seeds(keys: Sequence[tuple[str, int]], seed: int, role: str) -> list[int]:
    """Derive a seed for the helpful and one for the harmful persona of each (query, sample)."""
    return [
        request_seed(seed, query, persona, role, *([str(sample)] if sample else []))
        for query, sample in keys
        for persona in ("helpful", "harmful")
    ]


def _answers(
    engine: Generator, requests: Sequence[GenerationRequest], sampling: Sampling
) -> Iterator[tuple[int, tuple[str, bool]]]:
    """Yield the number of each request with its text, and whether it was cut at the limit of tokens."""
    for index, completion in engine.generate(requests, sampling):
        cut = completion.finish_reason == "length"
        yield index, (whole_sentences(completion.text) if cut else completion.text, cut)


_LIST_ITEM = re.compile(r"^\s*(?:\d{1,3}[.)]|[-*\u2022])\s", re.MULTILINE)


def whole_sentences(text: str) -> str:
    """Cut `text` after its last whole sentence; return all of it where it has none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    while ends and _LIST_NUMBER.search(text[: ends[-1]]):
        ends.pop()
    return text[: ends[-1]] if ends else text


def _one_line(characteristics: str) -> str:
    """Put characteristics on one line without a full stop, so that a sentence can go on after them."""
    return " ".join(characteristics.split()).rstrip(".")


def answer_prompts(templates: Templates, pair: PreferencePair) -> tuple[str, str]:
    """Return the prompts under which the helpful and the harmful answer were generated."""
    return _answer_prompts(templates, pair.query, pair.helpful_characteristics, pair.harmful_characteristics)


def _answer_prompts(templates: Templates, query: str, helpful: str, harmful: str) -> tuple[str, str]:
    return (
        templates.answer_prompt(templates.helpful, query, helpful),
        templates.answer_prompt(templates.harmful, query, harmful),
    )


def answered(templates: Templates, pair: PreferencePair) -> tuple[Passage, ...]:
    """Return the plain prompt of a pair with the helpful and with the harmful answer."""
    plain = templates.plain_prompt(pair.query)
    return tuple(Passage(plain, templates.continued(text)) for text in (pair.helpful, pair.harmful))


@dataclass(frozen=True, eq=False)
class PersonaFit:
    """The measurements of a pair under its two personas.

    Attributes:
        margins: by how much better the helpful and the harmful answer fit their own persona than the other:
            log P(answer | its persona) - log P(answer | the other persona), in nat over the first 12 tokens
            of the answer, by the model's own likelihoods.
        prompts: the hidden states at the end of each prompt, float16 [n_readouts, n_layer, n_embd].
    """

    margins: tuple[float, float]
    prompts: Mapping[Passage, NDArray[np.float16]]


def compare_personas(
    engine: Engine, pairs: Sequence[PreferencePair], templates: Templates, readouts: Sequence[Readout] = ()
) -> Iterator[PersonaFit]:
    """Measure how the answers of each pair fit the two personas, and read hidden states of their prompts.

    Args:
        engine: the model that wrote the pairs.
        pairs: the pairs to measure.
        templates: the prompts of the personas.
        readouts: the hidden states to read at the end of each prompt.

    Raises:
        QueryError: an answer is empty.
    """
    prompts = [tuple(map(Passage, answer_prompts(templates, pair))) for pair in pairs]
    answers = [
        Passage(prompt.text, templates.continued(answer))
        for pair, persona_prompts in zip(pairs, prompts, strict=True)
        for prompt in persona_prompts
        for answer in (pair.helpful, pair.harmful)
    ]
    logprobs = engine.response_logprobs(answers, max_tokens=MARGIN_TOKENS)
    flat_prompts = [prompt for persona_prompts in prompts for prompt in persona_prompts]
    activations = engine.activations(flat_prompts, readouts) if readouts else None
    for persona_prompts in prompts:
        states, fits = {}, []
        for prompt in persona_prompts:
            if activations is not None:  # before the answers, which an engine can then go on with from there
                states[prompt] = next(activations)
            fits.append((next(logprobs), next(logprobs)))
        (helpful_own, harmful_other), (helpful_other, harmful_own) = fits
        yield PersonaFit((helpful_own - helpful_other, harmful_own - harmful_other), states)
