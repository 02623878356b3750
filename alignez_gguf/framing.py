"""How a conversation becomes a prompt: the model's chat template, or a transcript for base models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from alignez_gguf.errors import QueryError
from alignez_gguf.jinja_template import JinjaTemplate, Message
from alignez_gguf.prompts import METADATA_KEY, Templates

__all__ = ["Framing", "HasMetadata", "Message", "Turn"]

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
    _chat_template: JinjaTemplate | None = None

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
                bos, eos = model.token_text(model.bos), model.token_text(model.eos)
                return cls((), chosen, JinjaTemplate(chat_template, bos, eos))
        return cls(chosen.stop, chosen)

    def prompt(self, turns: Sequence[Turn], message: str, system: str = "") -> str:
        """The prompt whose completion answers `message` after the earlier `turns`.

        Args:
            system: what the model is told before the conversation; a transcript begins with it.

        Raises:
            TemplateError: the chat template fails, or drops a message.
        """
        if self._chat_template is None:
            transcript = self._templates.transcript(turns, message)
            return f"{system}\n\n{transcript}" if system else transcript
        messages = [Message("system", system)] if system else []
        for said, answered in turns:
            messages += [Message("user", said), Message("assistant", answered)]
        return self._chat_template.render([*messages, Message("user", message)])

    def prompt_of(self, messages: Sequence[Message]) -> str:
        """The same for a list of messages as OpenAI's API has them.

        A chat template decides itself what it accepts, but may drop nothing of that. A transcript takes
        system messages at the beginning, joins neighbouring messages of one role, and has to end with the
        user.

        Raises:
            QueryError: the messages cannot become a transcript.
            TemplateError: the chat template refuses them, or drops one.
        """
        if self._chat_template is not None:
            return self._chat_template.render(messages)
        n_system = next((i for i, one in enumerate(messages) if one.role != "system"), len(messages))
        system = "\n\n".join(one.content for one in messages[:n_system])
        joined: list[Message] = []
        for message in messages[n_system:]:
            if message.role == "system":
                raise QueryError("this model takes system messages only before the conversation; move them")
            if joined and joined[-1].role == message.role:
                message = Message(message.role, f"{joined.pop().content}\n\n{message.content}")
            joined.append(message)
        if not joined or (joined[0].role, joined[-1].role) != ("user", "user"):
            raise QueryError("the conversation has to begin and to end with a message of the user")
        turns = [
            (said.content, answered.content)
            for said, answered in zip(joined[:-1:2], joined[1::2], strict=True)
        ]
        return self.prompt(turns, joined[-1].content, system)
