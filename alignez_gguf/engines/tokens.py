"""Tokenizes prompts and passages, and checks that they fit the context; the same for every engine."""

from __future__ import annotations

from collections.abc import Callable

from alignez_gguf.engines.base import Passage
from alignez_gguf.errors import QueryError

_SHOWN = 60

Tokenize = Callable[[str], list[int]]


def prompt_tokens(tokenize: Tokenize, prompt: str, n_ctx: int, n_new: int = 0) -> list[int]:
    """Return the tokens of a prompt that `n_new` generated tokens follow.

    Raises:
        QueryError: there are none, or they do not fit into the context.
    """
    tokens = tokenize(prompt)
    if not tokens:
        raise QueryError("a prompt is empty, and this model has no token to begin with; give it text")
    if len(tokens) + n_new > n_ctx:
        answer = f" and {n_new} for the answer" if n_new else ""
        raise QueryError(
            f"the prompt {_shown(prompt)} takes {len(tokens)} tokens{answer}, more than the context of "
            f"{n_ctx}; shorten it or ask for a larger context"
        )
    return tokens


def passage_tokens(tokenize: Tokenize, passage: Passage, n_ctx: int) -> tuple[list[int], int]:
    """Return the tokens of a passage, and the index of the first that counts as response.

    It is the first one behind as many as the prompt alone has; at least the last one.

    Raises:
        QueryError: the text is empty or does not fit into the context.
    """
    tokens = prompt_tokens(tokenize, passage.text, n_ctx)
    return tokens, min(len(tokenize(passage.prompt)), len(tokens) - 1)


def response_tokens(
    tokenize: Tokenize, passage: Passage, n_ctx: int, max_tokens: int | None
) -> tuple[list[int], int]:
    """Return the tokens of a passage with at most `max_tokens` of its response, and where that begins.

    Raises:
        QueryError: as `passage_tokens`; or there is no response, or nothing before it.
    """
    if not passage.response:
        raise QueryError(f"the prompt {_shown(passage.prompt)} has no response; give one")
    tokens, first = passage_tokens(tokenize, passage, n_ctx)
    if first == 0:
        raise QueryError(f"the response {_shown(passage.response)} has no prompt; give one")
    return tokens[: None if max_tokens is None else first + max_tokens], first


def steered_tokens(tokenize: Tokenize, passage: Passage, max_tokens: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, and the first `max_tokens` of its answer, to measure its likelihood.

    Raises:
        QueryError: the prompt has fewer than two tokens, or the answer none.
    """
    prompt = tokenize(passage.prompt)
    if len(prompt) < 2:
        raise QueryError(f"the prompt {_shown(passage.prompt)} is too short to steer; use a longer query")
    answer = tokenize(passage.text)[len(prompt) :][:max_tokens]
    if not answer:
        raise QueryError(f"the answer to {_shown(passage.prompt)} is empty, so that it has no likelihood")
    return prompt, answer


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
