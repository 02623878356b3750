"""Reads rows of data sets for preference optimisation: the fields `prompt`, `chosen` and `rejected`.

Each field may be a text or a list of messages with `role` and `content`. This module does not know
our own pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from alignez_gguf.errors import QueryError
from alignez_gguf.prompts.jinja_template import Message

FIELDS = ("prompt", "chosen", "rejected")

NEEDED = "a pair needs the fields query, helpful and harmful (or prompt, chosen and rejected)"

_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]""")
"""The beginning of a list of messages that a table of texts, such as CSV, has turned into a text."""


def read_preference(row: Mapping[str, object], where: str) -> tuple[str, str, str]:
    """Return the prompt, the chosen and the rejected answer of a row, whatever else it holds.

    Where an answer is a list of messages, its last one is the answer, and what comes before it is the prompt.

    Args:
        row: the fields of the row.
        where: the file and line of the row, for errors.

    Raises:
        QueryError: a field is missing or of another form, the fields ask different things, or there is more
            than one message of the user before the answer.
    """
    queries: dict[str, str] = {}
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        queries["prompt"] = _only_query(_messages(prompt, "prompt", where), "prompt", where)
    elif prompt is not None:
        queries["prompt"] = _text(prompt, "prompt", where)
    answers = []
    for field in ("chosen", "rejected"):
        value = row.get(field)
        if not isinstance(value, list):
            answers.append(_text(value, field, where))
            continue
        *before, answer = _messages(value, field, where)
        if answer.role != "assistant":
            raise QueryError(
                f"{where}: the last message of `{field}` is not the assistant's; end with the answer"
            )
        if before:
            queries[field] = _only_query(before, field, where)
        answers.append(answer.content)
    if not queries:
        raise missing("prompt", where)
    first, *further = queries
    for field in further:
        if queries[field].strip() != queries[first].strip():
            raise QueryError(
                f"{where}: `{first}` and `{field}` ask different things; give both the same query"
            )
    return queries[first], answers[0], answers[1]


def missing(field: str, where: str) -> QueryError:
    """Return the error that a row has no text in a field."""
    return QueryError(f"{where} has no str `{field}`; {NEEDED}")


def _text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise missing(field, where)
    if _MESSAGES_AS_TEXT.match(value):
        raise QueryError(
            f"{where}: `{field}` is a list of messages written as a text; give the rows as .jsonl"
        )
    return value


def _messages(value: Sequence[object], field: str, where: str) -> list[Message]:
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
        if not isinstance(role, str) or not isinstance(content, str):
            raise QueryError(
                f"{where}: `{field}` is a list, but not of messages; give each the texts role and content"
            )
        messages.append(Message(role, content))
    if not messages:
        raise QueryError(f"{where}: `{field}` is an empty list; give its messages or a text")
    return messages


def _only_query(messages: Sequence[Message], field: str, where: str) -> str:
    """Return the only message of the user before an answer."""
    kept = [message for message in messages if message.role != "system" or message.content.strip()]
    if [message.role for message in kept] != ["user"]:
        roles = ", ".join(message.role for message in kept)
        raise QueryError(
            f"{where}: `{field}` is a conversation ({roles}) before the answer, which a pair cannot hold; "
            "keep rows with one message of the user there"
        )
    return kept[0].content
