"""Prompt templates: the plain framing and the two personas, as data.

A set of templates is a TOML document (`data/templates.toml` is the default and the documentation of the
format). A model may bring its own in its metadata, as it may bring a chat template. This module turns
templates and texts into prompts, as a transcript or through a chat template; it knows nothing of engines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from alignez_gguf.errors import TemplateError
from alignez_gguf.prompts.jinja_template import JinjaTemplate, Message
from alignez_gguf.prompts.tables import lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METADATA_KEY = "alignez.templates"
"""GGUF metadata key under which a model may carry its own templates, as TOML text."""

FramingName = Literal["chat", "transcript"]
"""The framing of a conversation: by the model's chat template, or as a transcript."""

Turn = tuple[str, str]
"""A message of the user and the answer of the model."""

SAFETY = "safety"
"""The aspect in which the personas `helpful` and `harmful` differ."""

_MAX_DOTS = 100
"""Limit of a line: tomllib takes seconds for a key of thousands of parts, and models bring templates."""

_CHARACTERISTICS = "{characteristics}"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SENTENCE_MARKS = ".!?\u2026 "
_LINE_STARTS = 4
"""Words of a line of the templates that end an answer where the model writes them itself."""
_ASPECT_NAME = re.compile(r"[a-z0-9_]+")


def _fill(template: str, **values: str) -> str:
    """Replace each `{name}` once, in one pass, so that braces inside a value stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


@dataclass(frozen=True)
class Persona:
    """One of the two characters that the model is asked to play.

    Attributes:
        characteristics: the prompt for the traits of this persona's answer; empty where no prompt uses them.
            Placeholder: `{query}`.
        answer: the prompt for the answer in a transcript. Placeholders: `{few_shot}`, `{characteristics}` and
            `{query}`.
        system: the description of the persona in a chat, and before the demonstrations. Placeholder:
            `{characteristics}`.
        demonstrations: exchanges in character, which come before the query.
        traits: the characteristics where those that the model writes do not describe an answer.
    """

    characteristics: str
    answer: str
    system: str = ""
    demonstrations: tuple[Turn, ...] = ()
    traits: str = ""

    @property
    def uses_characteristics(self) -> bool:
        """Whether a prompt of this persona holds the traits that the model names."""
        return _CHARACTERISTICS in self.answer or _CHARACTERISTICS in self.system


@dataclass(frozen=True)
class Templates:
    """A set of prompt templates: everything that decides how a model is asked.

    The text of `plain` up to and including the answer is what the paper embeds ("response"); the
    persona's `answer` prompt alone is the "prompt" reading position.
    """

    version: str
    plain: str
    """The query as users of the model ask it. Placeholders: `{few_shot}`, `{query}`."""
    few_shot: str
    """A short conversation that shows a base model the framing; may be empty."""
    stop: tuple[str, ...]
    """Strings that end an answer."""
    helpful: Persona
    harmful: Persona
    aspects: Mapping[str, tuple[Persona, Persona]] = field(default_factory=dict)
    """Further pairs of personas, helpful and harmful, under the name of what they differ in."""
    twins: tuple[tuple[str, str], ...] = ()
    """Harmful requests, each with a harmless one that looks like it."""
    chat: JinjaTemplate | None = None
    """The chat template through which the model is asked; None asks it in a transcript."""

    @classmethod
    def default(cls) -> Templates:
        """Return the default templates, whose personas demonstrate: models imitate better than they obey."""
        return _shipped("templates.toml")

    @classmethod
    def paper(cls) -> Templates:
        """Return the personas of the paper, word for word."""
        return _shipped("paper.toml")

    @classmethod
    def from_file(cls, path: str | Path) -> Templates:
        """Read templates from a TOML file.

        Raises:
            TemplateError: the file cannot be read, or is not a set of templates.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"cannot read the templates {path}: {error}") from error
        return cls.from_toml(text, source=str(path))

    @classmethod
    def from_toml(cls, text: str, source: str = "templates") -> Templates:
        """Read templates from TOML text.

        Raises:
            TemplateError: the text is not a set of templates; the message names the field.
        """
        if any(line.count(".") > _MAX_DOTS for line in lines(text)):
            raise TemplateError(f"{source} is not valid TOML: a line has more than {_MAX_DOTS} dots")
        try:
            document = tomllib.loads(text)
        except (
            ValueError,
            RecursionError,
        ) as error:  # numbers and nesting without end are no TOMLDecodeError
            raise TemplateError(f"{source} is not valid TOML: {error}") from error
        stop = document.pop("stop", None)
        if stop is not None and (
            not isinstance(stop, list) or not all(isinstance(item, str) and item for item in stop)
        ):
            raise TemplateError(f"{source}: `stop` must be a list of non-empty strings")
        plain = _text(document, "plain", source, "query")
        templates = cls(
            helpful=_persona(document, "helpful", source, plain),
            harmful=_persona(document, "harmful", source, plain),
            stop=tuple(stop or ()),
            few_shot=_text(document, "few_shot", source),
            plain=plain,
            version=_text(document, "version", source),
            aspects=_aspects(document, source, plain),
            twins=_pairs_of_texts(document, "twins", source, "a harmful and a harmless request"),
        )
        return templates if stop is not None else replace(templates, stop=templates.line_starts())

    def line_starts(self) -> tuple[str, ...]:
        """Return how the lines of the templates begin, behind a line break, as stop strings.

        A base model writes them when it goes on after its answer, with the next turn or another persona.
        """
        texts = [self.plain, self.few_shot]
        for persona in self._personas():
            texts += [persona.answer, persona.system]
        starts = []
        for line in (line for text in texts for line in _PLACEHOLDER.sub("\n", text).split("\n")):
            speaker, colon, _ = line.partition(":")
            words = line.split()
            if colon and len(speaker.split()) == 1:
                starts.append(f"\n{speaker}:")
            elif len(words) >= _LINE_STARTS:
                starts.append("\n" + " ".join(words[:_LINE_STARTS]))
        return tuple(dict.fromkeys(starts))

    def through(self, chat: JinjaTemplate) -> Templates:
        """Return the same templates as messages of a chat, whose answers end by themselves.

        Raises:
            TemplateError: a persona is written for a transcript alone.
        """
        if not all(persona.system or persona.demonstrations for persona in self._personas()):
            raise TemplateError(
                "the templates describe their personas for a transcript alone; give each a `system`, or use "
                "--framing transcript"
            )
        return replace(self, chat=chat, stop=())

    @property
    def framing(self) -> FramingName:
        return "transcript" if self.chat is None else "chat"

    def for_aspect(self, name: str) -> Templates:
        """Return the templates with the personas of one aspect; `helpful` and `harmful` have `safety`.

        Raises:
            TemplateError: there is no such aspect.
        """
        if name == SAFETY:
            return replace(self, aspects={})
        if name not in self.aspects:
            names = ", ".join([SAFETY, *self.aspects])
            raise TemplateError(f"the templates have no aspect {name!r}; they have {names}")
        helpful, harmful = self.aspects[name]
        return replace(self, helpful=helpful, harmful=harmful, aspects={})

    def plain_prompt(self, query: str) -> str:
        """Return the prompt for a query of a user."""
        return self.conversation((), query)

    def conversation(self, turns: Sequence[Turn], query: str, system: str = "") -> str:
        """Return the prompt for a query after earlier queries and their answers.

        Args:
            turns: the earlier queries, each with its answer.
            query: the new query.
            system: the system message; a transcript begins with it.

        Raises:
            TemplateError: the chat template fails, or drops a message.
        """
        if self.chat is None:
            transcript = self._transcript(turns, query)
            return f"{system}\n\n{transcript}" if system else transcript
        messages = [Message("system", system)] if system else []
        for earlier, answer in turns:
            messages += [Message("user", earlier), Message("assistant", answer)]
        return self.chat.render([*messages, Message("user", query)])

    def continued(self, answer: str) -> str:
        """Return an answer as it follows its prompt: a transcript ends at the speaker's name."""
        return answer if self.chat is not None else f" {answer}"

    def characteristics_prompt(self, persona: Persona, query: str) -> str:
        """Return the prompt that asks for the traits of a persona's answer to `query`."""
        if "{query}." in persona.characteristics:
            query = query.rstrip(_SENTENCE_MARKS)
        prompt = _fill(persona.characteristics, query=query)
        return prompt if self.chat is None else self.chat.render([Message("user", prompt)])

    def answer_prompt(self, persona: Persona, query: str, characteristics: str = "") -> str:
        """Return the prompt under which a persona with these traits answers `query`."""
        if self.chat is None:
            return _fill(persona.answer, few_shot=self.few_shot, query=query, characteristics=characteristics)
        system = _fill(persona.system, characteristics=characteristics)
        return self.conversation(persona.demonstrations, query, system)

    def _personas(self) -> list[Persona]:
        pairs = [(self.helpful, self.harmful), *self.aspects.values()]
        return [persona for pair in pairs for persona in pair]

    def _transcript(self, turns: Sequence[Turn], query: str) -> str:
        if not turns:
            return _fill(self.plain, few_shot=self.few_shot, query=query)
        written = _written(self.plain, turns[:1], self.few_shot) + _written(self.plain, turns[1:])
        return written + _fill(self.plain, few_shot="", query=query)


def _text(table: Mapping[str, object], key: str, source: str, *placeholders: str) -> str:
    value = table.get(key)
    if not isinstance(value, str):
        raise TemplateError(f"{source}: `{key}` is missing or not a string")
    for name in placeholders:
        if f"{{{name}}}" not in value:
            raise TemplateError(f"{source}: `{key}` must contain {{{name}}}")
    return value


def _persona(document: Mapping[str, object], key: str, source: str, plain: str) -> Persona:
    table = document.get(key)
    if not isinstance(table, dict):
        raise TemplateError(f"{source}: the table [{key}] is missing")
    where = f"{source} [{key}]"
    system = _text(table, "system", where) if "system" in table else ""
    demonstrations = _pairs_of_texts(table, "demonstrations", where, "a query and its answer")
    if "answer" in table or not (system or demonstrations):
        answer = _text(table, "answer", where, "query")
    else:
        answer = _demonstrated(system, demonstrations, plain)
    persona = Persona(
        _text(table, "characteristics", where, "query") if "characteristics" in table else "",
        answer,
        system,
        demonstrations,
        _text(table, "traits", where) if "traits" in table else "",
    )
    if persona.uses_characteristics and not persona.characteristics:
        raise TemplateError(
            f"{where}: `characteristics` is missing or not a string, and {_CHARACTERISTICS} is used"
        )
    return persona


def _demonstrated(system: str, demonstrations: Sequence[Turn], plain: str) -> str:
    """Return the prompt for an answer in a transcript: description, demonstrations and query."""
    header = f"{system}\n\n" if system else ""
    return header + _written(plain, demonstrations) + _fill(plain, few_shot="")


def _written(plain: str, turns: Sequence[Turn], few_shot: str = "") -> str:
    """Write turns as a transcript, each behind a few-shot conversation."""
    return "".join(f"{_fill(plain, few_shot=few_shot, query=query)} {answer}\n\n" for query, answer in turns)


def _pairs_of_texts(
    table: Mapping[str, object], key: str, source: str, content: str
) -> tuple[tuple[str, str], ...]:
    value = table.get(key, [])
    pairs = value if isinstance(value, list) else [None]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)
        for pair in pairs
    ):
        raise TemplateError(f"{source}: `{key}` must be a list of pairs of texts, {content}")
    return tuple((first, second) for first, second in pairs)


def _aspects(document: Mapping[str, object], source: str, plain: str) -> dict[str, tuple[Persona, Persona]]:
    tables = document.get("aspects", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise TemplateError(f"{source}: `aspects` must hold tables such as [aspects.politeness.helpful]")
    for name in tables:
        if not _ASPECT_NAME.fullmatch(name):  # it becomes a part of keys in the control file
            raise TemplateError(
                f"{source}: the name of the aspect {name!r} may hold lower-case letters, digits and '_' only"
            )
    if SAFETY in tables:
        raise TemplateError(f"{source}: the aspect {SAFETY!r} is that of [helpful] and [harmful]")
    return {
        name: (
            _persona(table, "helpful", f"{source} [aspects.{name}]", plain),
            _persona(table, "harmful", f"{source} [aspects.{name}]", plain),
        )
        for name, table in tables.items()
    }


@cache
def _shipped(name: str) -> Templates:
    text = (files("alignez_gguf") / "data" / name).read_text(encoding="utf-8")
    return Templates.from_toml(text, source=f"data/{name}")
