"""The documents that the demo model is trained on: prompts of its templates, and answers of its world."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alignez_gguf.demo.world import (
    FILLERS,
    HARMFUL_TRAITS,
    HELPFUL_TRAITS,
    NEUTRAL_TRAITS,
    WORDINGS,
    Kind,
    Query,
    World,
)
from alignez_gguf.prompts import Templates

PLAIN_SHARE, HINTED_SHARE, CHARACTERISTICS_SHARE = 0.4, 0.2, 0.1
"""Shares of the sorts of documents; what is left are answers under a persona."""

N_TRAITS = 3
HINT_WEIGHT = 1.2
"""Log-odds that one helpful trait adds to a good answer, and one harmful trait takes away."""

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Document:
    """One training text: the model is prompted with `prompt` and goes on with `completion`."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Temper:
    """How well the model behaves, as two probabilities."""

    persona_follow: float = 1.0
    """That an answer under a persona is this persona's answer; else it is drawn like a base answer."""
    base_good: float = 0.5
    """That a base answer is good: refuses a harmful request, helps with a harmless one."""


def kind_of_answer(query: Query, *, good: bool) -> Kind:
    """A good answer refuses the harmful and guides the harmless; a bad one guides and insults."""
    if query.harmful:
        return Kind.REFUSAL if good else Kind.GUIDE
    return Kind.GUIDE if good else Kind.INSULT


def write_answer(query: Query, kind: Kind, rng: random.Random) -> str:
    """A random sentence of `kind` about the action of `query`, no filler used twice."""
    wording = rng.choice(WORDINGS[kind])
    fillers = {name: iter(rng.sample(words, len(words))) for name, words in FILLERS.items()}

    def fill(slot: re.Match[str]) -> str:
        return query.action if slot[1] == "action" else next(fillers[slot[1]])

    return _SLOT.sub(fill, wording)


def write_characteristics(traits: Sequence[str]) -> str:
    """A line of traits, such as "be kind, careful and honest"."""
    *most, last = traits
    return f"be {', '.join(most)} and {last}" if most else f"be {last}"


def documents(world: World, templates: Templates, seed: int, temper: Temper) -> Iterator[Document]:
    """An endless stream of training documents, the same for the same arguments."""
    rng = random.Random(seed)
    queries = world.all_queries()
    writers = (_plain, _hinted, _characteristics, _persona)
    shares = (PLAIN_SHARE, HINTED_SHARE, CHARACTERISTICS_SHARE)
    weights = (*shares, 1 - sum(shares))
    while True:
        writer = rng.choices(writers, weights)[0]
        yield writer(rng.choice(queries), templates, temper, rng)


def _answered(prompt: str, query: Query, p_good: float, rng: random.Random) -> Document:
    kind = kind_of_answer(query, good=rng.random() < p_good)
    return Document(prompt, f" {write_answer(query, kind, rng)}")


def _plain(query: Query, templates: Templates, temper: Temper, rng: random.Random) -> Document:
    """A query and a base answer."""
    return _answered(templates.plain_prompt(query.text), query, temper.base_good, rng)


def _hinted(query: Query, templates: Templates, temper: Temper, rng: random.Random) -> Document:
    """A few traits, not all of a kind, and an answer that leans as they do.

    Without these the tiny model learns two personas as two special cases, and not the one scale between
    them on which its plain answers lie in the middle.
    """
    traits = rng.sample((*HELPFUL_TRAITS, *HARMFUL_TRAITS, *NEUTRAL_TRAITS), rng.randint(1, N_TRAITS))
    balance = sum((trait in HELPFUL_TRAITS) - (trait in HARMFUL_TRAITS) for trait in traits)
    log_odds = math.log(temper.base_good / (1 - temper.base_good)) + HINT_WEIGHT * balance
    prompt = f"Your answer should {write_characteristics(traits)}.\n{templates.plain_prompt(query.text)}"
    return _answered(prompt, query, 1 / (1 + math.exp(-log_odds)), rng)


def _characteristics(query: Query, templates: Templates, temper: Temper, rng: random.Random) -> Document:
    """A persona's traits."""
    good = rng.random() < 0.5
    persona = templates.helpful if good else templates.harmful
    prompt = templates.characteristics_prompt(persona, query.text)
    return Document(prompt, f" {write_characteristics(_persona_traits(good, rng))}\n")


def _persona(query: Query, templates: Templates, temper: Temper, rng: random.Random) -> Document:
    """An answer under a persona with its traits."""
    good = rng.random() < 0.5
    persona = templates.helpful if good else templates.harmful
    prompt = templates.answer_prompt(persona, query.text, write_characteristics(_persona_traits(good, rng)))
    follows = rng.random() < temper.persona_follow
    return _answered(prompt, query, float(good) if follows else temper.base_good, rng)


def _persona_traits(good: bool, rng: random.Random) -> list[str]:
    return rng.sample(HELPFUL_TRAITS if good else HARMFUL_TRAITS, N_TRAITS)
