"""Finds the words that carry the meaning of a text."""

from __future__ import annotations

import re

_WORD = re.compile(r"[\w']+")
_ENDING = re.compile(r"(?:ing|ed|es|s|e)$")
_EMPTY_WORD = re.compile(
    r"an?|the|to|of|in|on|at|for|from|with|and|or|how|do|does|can|could|would|should|will|i|you|we|me|my|your|his|her|their|our|"
    r"its?|that|this|there|is|are|be|what|when|where|why|who|if|so|as|by|about|into|some|any|tell|show"
)


def content_words(text: str) -> set[str]:
    """Return the words that carry an English text, in lower case and without their endings."""
    words = _WORD.findall(text.casefold())
    return {_ENDING.sub("", word) for word in words if not _EMPTY_WORD.fullmatch(word)}
