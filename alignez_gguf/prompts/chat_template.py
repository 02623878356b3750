"""Turns a conversation into a prompt: by the model's chat template, or as a transcript for base models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from alignez_gguf.errors import QueryError, TemplateError
from alignez_gguf.prompts.jinja_template import JinjaTemplate, Message
from alignez_gguf.prompts.templates import METADATA_KEY, FramingName, Templates, Turn

__all__ = ["ChatTemplate", "FramingChoice", "HasMetadata", "Message", "Turn", "other_framing", "templates_of"]

FramingChoice = Literal["auto", "chat", "transcript"]
"""How to ask a model; "auto" uses its chat template where it has one and nobody gives templates."""

_CHAT_TEMPLATE = "tokenizer.chat_template"


class HasMetadata(Protocol):
    """A model whose metadata and special tokens can be looked up."""

    bos: int
    eos: int

    def metadata(self, key: str) -> str | None: ...

    def token_text(self, token: int) -> str: ...


def templates_of(
    model: HasMetadata | None,
    path: Path | None = None,
    framing: FramingChoice = "auto",
    *,
    default: Callable[[], Templates] = Templates.default,
) -> Templates:
    """Choose the templates by which a model is asked: the user's, the model's own, or the default ones.

    Args:
        model: the model, or None for one without metadata, which is asked in a transcript.
        path: the file with the user's templates.
        framing: "chat" asks through the model's chat template, "transcript" does not, and "auto" does where
            there is one and neither the user nor the model brings templates.
        default: returns the templates that ship with the package.

    Raises:
        TemplateError: the templates or the chat template cannot be used, or there is none to ask through.
    """
    own = model.metadata(METADATA_KEY) if model is not None else None
    if path is not None:
        chosen = Templates.from_file(path)
    elif own is not None:
        chosen = Templates.from_toml(own, source="the templates in the model's metadata")
    else:
        chosen = default()
    chat = model.metadata(_CHAT_TEMPLATE) if model is not None else None
    if framing == "chat" and not chat:
        raise TemplateError("the model has no chat template; use --framing transcript")
    if not chat or framing == "transcript" or (framing == "auto" and (path, own) != (None, None)):
        return chosen
    assert model is not None
    return chosen.through(JinjaTemplate(chat, model.token_text(model.bos), model.token_text(model.eos)))


def other_framing(fitted: str, used: FramingName) -> str:
    """Return a warning where a control file is used in another framing than it was fitted in, else ""."""
    if fitted in ("", used):
        return ""
    return (
        f"the control file was fitted in the framing {fitted!r} and is used in {used!r}, where it may do "
        f"less or something else; use --framing {fitted}, or export it again with --framing {used}"
    )


@dataclass(frozen=True)
class ChatTemplate:
    """Turns a conversation into the text that the model completes."""

    templates: Templates

    @classmethod
    def of(
        cls, model: HasMetadata, templates: Path | None = None, framing: FramingChoice = "auto"
    ) -> ChatTemplate:
        """Choose the templates of a model as `templates_of` does.

        Raises:
            TemplateError: the templates or the chat template cannot be used.
        """
        return cls(templates_of(model, templates, framing))

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return self.templates.stop

    def prompt(self, turns: Sequence[Turn], message: str, system: str = "") -> str:
        """Return the prompt whose completion answers `message` after the earlier `turns`.

        Args:
            turns: the earlier messages of the user, each with its answer.
            message: the new message of the user.
            system: the system message; a transcript begins with it.

        Raises:
            TemplateError: the chat template fails, or drops a message.
        """
        return self.templates.conversation(turns, message, system)

    def prompt_of(self, messages: Sequence[Message]) -> str:
        """Return the prompt for a list of messages as in OpenAI's API.

        A chat template decides itself what it accepts, but may drop nothing of that. A transcript takes
        system messages at the beginning, joins neighbouring messages of one role, and has to end with the
        user.

        Raises:
            QueryError: the messages cannot become a transcript.
            TemplateError: the chat template refuses them, or drops one.
        """
        if self.templates.chat is not None:
            return self.templates.chat.render(messages)
        n_system = next(
            (index for index, message in enumerate(messages) if message.role != "system"), len(messages)
        )
        system = "\n\n".join(message.content for message in messages[:n_system])
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
            (question.content, answer.content)
            for question, answer in zip(joined[:-1:2], joined[1::2], strict=True)
        ]
        return self.prompt(turns, joined[-1].content, system)
