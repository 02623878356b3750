"""Measures by the characters of a text whether it repeats itself or consists of debris."""

from __future__ import annotations

import re

REPETITIVE = 0.25
"""An answer does not read well if a greater share of its three-word sequences occurred before."""

_LOOP = re.compile(r"([^\s.,\-=_*#~+|]{1,12}?)\1{2,}")
"""Characters that come again and again; rules such as "-----" are no words."""
_LONG_LOOP = 16
"""Length in characters from which a loop is one that nobody writes."""
_TAG = re.compile(r"</?\w[^<>]*>")
_LEAST_LETTERS = 0.4
"""A text with a smaller share of letters and digits among its characters, spaces apart, is debris."""


def is_broken(text: str) -> bool:
    """Whether a text is empty, runs in a loop, or consists of debris such as tags and signs."""
    characters = "".join(_TAG.sub("", text).split())
    n_letters = sum(character.isalnum() for character in characters)
    loops = any(len(loop[0]) >= _LONG_LOOP for loop in _LOOP.finditer(text))
    return loops or n_letters <= _LEAST_LETTERS * len(characters) or "\ufffd" in characters


_N_GRAM = 3
_WORD = re.compile(r"\w+")


def repetition(text: str) -> float:
    """Return the share of three-word sequences that occurred before in a text; 0 for fewer than two."""
    words = _WORD.findall(text.casefold())
    grams = list(zip(*(words[start:] for start in range(_N_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0
