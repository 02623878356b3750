"""Surface cues: what can be seen of an answer without understanding it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.pairs.pairs import PreferencePair

_MIN_COUNT = 2
"""A first word that fewer answers begin with says nothing about others."""


def surface_features(pairs: Sequence[PreferencePair]) -> NDArray[np.float64]:
    """Length and first word of both answers, [2, n_pairs, 2 + n_words].

    The logarithms of the numbers of words and of characters, standardised, and a column for each word that
    several answers begin with; case does not count.
    """
    answers = [pair.helpful for pair in pairs] + [pair.harmful for pair in pairs]
    words = [answer.casefold().split() for answer in answers]
    lengths = np.log1p([(len(split), len(answer)) for split, answer in zip(words, answers, strict=True)])
    spread = lengths.std(axis=0)
    lengths = (lengths - lengths.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    first = [split[0] if split else "" for split in words]
    known = [word for word, count in Counter(first).items() if count >= _MIN_COUNT]
    begins = np.array([[word == other for other in known] for word in first], np.float64)
    return np.concatenate([lengths, begins.reshape(len(answers), -1)], axis=1).reshape(2, len(pairs), -1)
