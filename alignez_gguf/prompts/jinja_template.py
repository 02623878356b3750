"""A model's own chat template: a program in jinja, rendered as transformers does it.

Templates drop without a word what they do not expect: text that is not a list of typed parts, a system
message, earlier turns. So each kind of conversation is rendered once with probe texts, to find the way of
writing its messages down that keeps them all. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignez_gguf.errors import TemplateError

_KINDS_KEPT = 256
"""Kinds of conversations whose form is remembered; finding one takes up to six renderings."""

_PART_AS_DATA = re.compile(r"""['"]text['"]:\s*['"]probe-\d+-text""")
"""A typed part that a template has written into the prompt as if it were a text."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
    """

    role: str
    content: str


_System = Literal["kept", "joined", "in the user's message"]
"""The place of the system messages at the beginning; joined, they are one."""


@dataclass(frozen=True)
class _Form:
    """The form in which messages are given to a template.

    Attributes:
        typed: whether contents are lists of typed parts, as vision models want them, and not strings.
        system: the place of the system messages at the beginning.
    """

    typed: bool
    system: _System

    def written(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the messages in this form, as dictionaries."""
        if self.system != "kept":
            is_joined = self.system == "joined"
            n_merged = _n_system([message.role for message in messages]) + (not is_joined)
            merged = "\n\n".join(message.content for message in messages[:n_merged])
            messages = [Message("system" if is_joined else "user", merged), *messages[n_merged:]]
        return [
            {
                "role": message.role,
                "content": [{"type": "text", "text": message.content}] if self.typed else message.content,
            }
            for message in messages
        ]


class JinjaTemplate:
    """A compiled chat template.

    Args:
        text: the source of the template.
        bos, eos: the texts of the special tokens.
        owner: the owner of the template, for errors.
        mend: the advice where it cannot be used, for errors.

    Raises:
        TemplateError: `text` is not a jinja template.
    """

    def __init__(
        self, text: str, bos: str, eos: str, *, owner: str = "the model", mend: str = "give --templates"
    ) -> None:
        self._text = text
        self._bos, self._eos = bos, eos
        self._owner, self._mend = owner, mend
        try:
            self._program = _environment().from_string(text)
        except JinjaError as error:
            raise self._error(f"cannot be read: {error}") from error
        self._form = lru_cache(maxsize=_KINDS_KEPT)(self._find_form)

    def __repr__(self) -> str:
        """Return everything that decides a rendering, since results are cached under a hash of it."""
        return f"JinjaTemplate({self._text!r}, {self._bos!r}, {self._eos!r})"

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt whose completion answers the messages.

        Contents are strings, or typed parts where the template keeps them only so. Where the template refuses
        or drops system messages at the beginning, they become one, or else part of the user's first message,
        as llama.cpp does it (common/chat.cpp, system_message_not_supported).

        Raises:
            TemplateError: the template fails, or drops a message whatever its form.
        """
        form = self._form(tuple(message.role for message in messages))
        try:
            return self._rendered(form.written(messages))
        except Exception as error:  # a template is a program of its own
            raise self._error(f"fails: {error}") from error

    def _find_form(self, roles: tuple[str, ...]) -> _Form:
        """Find the first form in which probe texts of these roles all appear in the prompt.

        Raises:
            TemplateError: there is none.
        """
        probes = [Message(role, f"probe-{index}-text") for index, role in enumerate(roles)]
        n_system = _n_system(roles)
        ways: list[_System] = ["kept"]
        if n_system > 1:
            ways.append("joined")
        if n_system > 0 and roles[n_system : n_system + 1] == ("user",):
            ways.append("in the user's message")
        reason = ""
        for system in ways:
            for typed in (False, True):
                form = _Form(typed, system)
                try:
                    text = _PART_AS_DATA.sub("", self._rendered(form.written(probes)).casefold())
                except Exception as error:  # a template is a program of its own
                    problem = f"fails: {error}"
                else:
                    lost = [index for index, probe in enumerate(probes) if probe.content not in text]
                    if not lost:
                        return form
                    problem = f"drops message {lost[0] + 1} of {len(roles)} ({roles[lost[0]]})"
                reason = reason if typed else problem  # strings are what most templates are made for
        raise self._error(reason)

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        # transformers also passes tools=None, over which the tool templates of Hermes fail to iterate.
        return self._program.render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=self._bos,
            eos_token=self._eos,
        )

    def _error(self, problem: str) -> TemplateError:
        return TemplateError(f"{self._owner}'s chat template {problem}; {self._mend}")


class _GenerationBlocks(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which marks what the model wrote, for training.

    transformers renders the body in a scope of its own (AssistantTracker in utils/chat_template_utils.py).
    """

    tags = {"generation"}  # noqa: RUF012  jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the dialect of jinja in which transformers renders (utils/chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = tojson
    return environment


def _n_system(roles: Sequence[str]) -> int:
    """Return the number of system messages at the beginning of a conversation."""
    return next((index for index, role in enumerate(roles) if role != "system"), len(roles))
