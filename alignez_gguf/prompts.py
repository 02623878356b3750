"""How a model is asked: the plain framing and the two personas, as data.

A set of templates is a TOML document (`data/templates.toml` is the default and the documentation of the
format). A model may bring its own in its metadata, as it may bring a chat template. This module turns
templates and texts into prompts; it knows nothing of engines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from alignez_gguf.errors import TemplateError
from alignez_gguf.records import lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METADATA_KEY = "alignez.templates"
"""GGUF metadata key under which a model may carry its own templates, as TOML text."""

SAFETY = "safety"
"""The aspect in which the personas `helpful` and `harmful` differ."""

_MAX_DOTS = 100
"""In a line: tomllib takes seconds for a key of thousands of parts, and a model may bring its templates."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_ASPECT_NAME = re.compile(r"[a-z0-9_]+")


def _fill(template: str, **values: str) -> str:
    """Replace each `{name}` once, in one pass, so that braces inside a value stay as they are."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


@dataclass(frozen=True)
class Persona:
    """One of the two characters that the model is asked to play."""

    characteristics: str
    """Asks for the traits of this persona's answer. Placeholder: `{query}`."""
    answer: str
    """Asks for the answer itself. Placeholders: `{few_shot}`, `{characteristics}`, `{query}`."""


@dataclass(frozen=True)
class Templates:
    """Everything that decides how a model is asked.

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

    @classmethod
    def default(cls) -> Templates:
        """The templates of the paper, framed for base models."""
        return _default()

    @classmethod
    def from_file(cls, path: str | Path) -> Templates:
        """Read templates from a TOML file. Raises `TemplateError`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"cannot read the templates {path}: {error}") from error
        return cls.from_toml(text, source=str(path))

    @classmethod
    def from_toml(cls, text: str, source: str = "templates") -> Templates:
        """Read templates from TOML text. Raises `TemplateError` naming the field that is wrong."""
        if any(line.count(".") > _MAX_DOTS for line in lines(text)):
            raise TemplateError(f"{source} is not valid TOML: a line has more than {_MAX_DOTS} dots")
        try:
            document = tomllib.loads(text)
        except (
            ValueError,
            RecursionError,
        ) as error:  # numbers and nesting without end are no TOMLDecodeError
            raise TemplateError(f"{source} is not valid TOML: {error}") from error
        stop = document.pop("stop", [])
        if not isinstance(stop, list) or not all(isinstance(item, str) and item for item in stop):
            raise TemplateError(f"{source}: `stop` must be a list of non-empty strings")
        return cls(
            helpful=_persona(document, "helpful", source),
            harmful=_persona(document, "harmful", source),
            stop=tuple(stop),
            few_shot=_text(document, "few_shot", source),
            plain=_text(document, "plain", source, "query"),
            version=_text(document, "version", source),
            aspects=_aspects(document, source),
        )

    def for_aspect(self, name: str) -> Templates:
        """The same with the personas of one aspect; `safety` is the one of `helpful` and `harmful`.

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
        """The prompt that a user's query becomes."""
        return _fill(self.plain, few_shot=self.few_shot, query=query)

    def transcript(self, turns: Sequence[tuple[str, str]], query: str) -> str:
        """The prompt that a query becomes after earlier queries and their answers."""
        if not turns:
            return self.plain_prompt(query)
        first, *later = [*(turn[0] for turn in turns), query]
        prompts = [self.plain_prompt(first)]
        prompts += [_fill(self.plain, few_shot="", query=message) for message in later]
        answers = [f" {answer}\n\n" for _, answer in turns]
        return "".join(map("".join, zip(prompts, [*answers, ""], strict=True)))

    def characteristics_prompt(self, persona: Persona, query: str) -> str:
        """The prompt that asks for the traits of a persona's answer to `query`."""
        return _fill(persona.characteristics, query=query)

    def answer_prompt(self, persona: Persona, query: str, characteristics: str) -> str:
        """The prompt under which a persona with these traits answers `query`."""
        return _fill(persona.answer, few_shot=self.few_shot, query=query, characteristics=characteristics)


def _text(table: Mapping[str, object], key: str, source: str, *placeholders: str) -> str:
    value = table.get(key)
    if not isinstance(value, str):
        raise TemplateError(f"{source}: `{key}` is missing or not a string")
    for name in placeholders:
        if f"{{{name}}}" not in value:
            raise TemplateError(f"{source}: `{key}` must contain {{{name}}}")
    return value


def _persona(document: Mapping[str, object], key: str, source: str) -> Persona:
    table = document.get(key)
    if not isinstance(table, dict):
        raise TemplateError(f"{source}: the table [{key}] is missing")
    where = f"{source} [{key}]"
    return Persona(
        characteristics=_text(table, "characteristics", where, "query"),
        answer=_text(table, "answer", where, "query"),
    )


def _aspects(document: Mapping[str, object], source: str) -> dict[str, tuple[Persona, Persona]]:
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
            _persona(table, "helpful", f"{source} [aspects.{name}]"),
            _persona(table, "harmful", f"{source} [aspects.{name}]"),
        )
        for name, table in tables.items()
    }


@cache
def _default() -> Templates:
    text = (files("alignez_gguf") / "data" / "templates.toml").read_text(encoding="utf-8")
    return Templates.from_toml(text, source="data/templates.toml")
