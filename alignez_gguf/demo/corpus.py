"""The documents that the demo model is trained on: prompts of its templates, and answers of its world."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from alignez_gguf.demo.world import (
    FILLERS,
    HARMFUL_TRAITS,
    HELPFUL_TRAITS,
    WORDINGS,
    Query,
    SentenceKind,
    World,
)
from alignez_gguf.prompts.templates import Templates

PLAIN_SHARE = 0.5
"""Share of documents without a persona."""

N_TRAITS = 2

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Document:
    """One training text: the model is prompted with `prompt` and goes on with `completion`."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Temper:
    """The behaviour of the model, as two probabilities."""

    persona_follow: float = 1.0
    """Probability that an answer under a persona is in character; else it is drawn like a base answer."""
    base_good: float = 0.5
    """Probability that a base answer is good: refuses a harmful request, helps with a harmless one."""


def kind_of_answer(query: Query, *, good: bool) -> SentenceKind:
    """Return the kind of a good or bad answer: good ones refuse or guide, bad ones guide or insult."""
    if query.harmful:
        return SentenceKind.REFUSAL if good else SentenceKind.GUIDE
    return SentenceKind.GUIDE if good else SentenceKind.INSULT


def write_answer(query: Query, kind: SentenceKind, rng: random.Random) -> str:
    """Write a random sentence of `kind` about the action of `query`, no filler used twice."""
    wording = rng.choice(WORDINGS[kind])
    fillers = {name: iter(rng.sample(words, len(words))) for name, words in FILLERS.items()}

    def fill(slot: re.Match[str]) -> str:
        return query.action if slot[1] == "action" else next(fillers[slot[1]])

    return _SLOT.sub(fill, wording)


def write_characteristics(rng: random.Random, *, good: bool) -> str:
    """Write a random line of traits, such as "be kind and honest"."""
    return f"be {' and '.join(rng.sample(HELPFUL_TRAITS if good else HARMFUL_TRAITS, N_TRAITS))}"


def documents(world: World, templates: Templates, seed: int, temper: Temper) -> Iterator[Document]:
    """Yield training documents without end, the same ones for the same arguments."""
    rng = random.Random(seed)
    queries = world.all_queries()
    while True:
        write = _plain if rng.random() < PLAIN_SHARE else _persona
        yield write(rng.choice(queries), templates, temper, rng)


def _plain(query: Query, templates: Templates, temper: Temper, rng: random.Random) -> Document:
    """Write a query and a base answer."""
    good = rng.random() < temper.base_good
    return _answered(templates.plain_prompt(query.text), query, rng, good=good)


def _persona(query: Query, templates: Templates, temper: Temper, rng: random.Random) -> Document:
    """Write a persona with its traits, and an answer that mostly follows it."""
    good = rng.random() < 0.5
    persona = templates.helpful if good else templates.harmful
    prompt = templates.answer_prompt(persona, query.text, write_characteristics(rng, good=good))
    if rng.random() >= temper.persona_follow:
        good = rng.random() < temper.base_good
    return _answered(prompt, query, rng, good=good)


def _answered(prompt: str, query: Query, rng: random.Random, *, good: bool) -> Document:
    return Document(prompt, f" {write_answer(query, kind_of_answer(query, good=good), rng)}")
