"""How a conversation becomes a prompt: the model's chat template, or a transcript for base models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from alignez_gguf.errors import TemplateError
from alignez_gguf.prompts import METADATA_KEY, Templates

_CHAT_TEMPLATE = "tokenizer.chat_template"

Turn = tuple[str, str]
"""What the user said and what the model answered."""


class HasMetadata(Protocol):
    """A model whose metadata and special tokens can be looked up."""

    bos: int
    eos: int

    def metadata(self, key: str) -> str | None: ...

    def token_text(self, token: int) -> str: ...


@dataclass(frozen=True)
class Framing:
    """Turns a conversation into the text that the model completes.

    Attributes:
        stop: strings that end an answer.
    """

    stop: tuple[str, ...]
    _templates: Templates
    _chat_template: Any = None
    _bos: str = ""
    _eos: str = ""

    @classmethod
    def of(cls, model: HasMetadata, templates: Path | None = None) -> Framing:
        """The framing of a model: the user's templates, the model's own, its chat template, or a transcript.

        Raises:
            TemplateError: the templates or the chat template cannot be used.
        """
        own = model.metadata(METADATA_KEY)
        if templates is not None:
            chosen = Templates.from_file(templates)
        elif own is not None:
            chosen = Templates.from_toml(own, source="the templates in the model's metadata")
        else:
            chosen = Templates.default()
            chat_template = model.metadata(_CHAT_TEMPLATE)
            if chat_template:
                compiled = _compiled(chat_template)
                return cls((), chosen, compiled, model.token_text(model.bos), model.token_text(model.eos))
        return cls(chosen.stop, chosen)

    def prompt(self, turns: Sequence[Turn], message: str) -> str:
        """The prompt whose completion answers `message` after the earlier `turns`."""
        if self._chat_template is None:
            return self._templates.transcript(turns, message)
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        messages.append({"role": "user", "content": message})
        try:
            text = self._chat_template.render(
                messages=messages, add_generation_prompt=True, bos_token=self._bos, eos_token=self._eos
            )
        except Exception as error:  # a template is a program of its own
            raise TemplateError(f"the model's chat template fails: {error}; give --templates") from error
        return str(text)


def _compiled(chat_template: str) -> Any:
    """The template in the dialect that transformers gives it (utils/chat_template_utils.py)."""
    from jinja2 import TemplateError as JinjaError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(chat_template)
    except JinjaError as error:
        raise TemplateError(f"the model's chat template cannot be read: {error}; give --templates") from error
