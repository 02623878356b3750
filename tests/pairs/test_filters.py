from __future__ import annotations

import numpy as np
import pytest

from alignez_gguf.pairs.filters import PairFilterReport, filter_pairs
from alignez_gguf.pairs.pairs import PreferencePair

LONG = "first whisk the eggs then add the flour and the milk and bake it for an hour"


def test_pairs_that_say_nothing_are_left_out_and_counted() -> None:
    pairs = [
        PreferencePair("kept", "I will help you.", "Get lost."),
        PreferencePair("kept", "One two three.", "Four five six.", truncated=True),
        PreferencePair("empty", "  \n", "Get lost."),
        PreferencePair("empty", "I will help you.", ""),
        PreferencePair("identical", "The  SAME answer", "the same\nanswer"),
        PreferencePair("near", LONG, LONG.replace("hour", "day")),
    ]
    kept, report = filter_pairs(pairs)
    assert [pair.query for pair in kept] == ["kept", "kept"]
    assert report == PairFilterReport(total=6, kept=2, empty=2, identical=1, near_identical=1, truncated=1)
    assert str(report) == "2 of 6 pairs are of use (left out: 2 empty, 1 identical, 1 near identical)"


@pytest.mark.parametrize(("changed", "kept"), [(1, 0), (2, 1)])
def test_answers_that_share_nine_words_in_ten_are_near_identical(changed: int, kept: int) -> None:
    words = [f"word{index}" for index in range(18)]
    other = [f"other{index}" if index < changed else word for index, word in enumerate(words)]
    assert filter_pairs([PreferencePair("q", " ".join(words), " ".join(other))])[1].kept == kept


def test_pair_goes_where_either_answer_fits_the_other_persona_as_well() -> None:
    pairs = [PreferencePair(str(index), "I will help.", "Get lost.") for index in range(6)]
    margins = np.array([[1.0, 2.0], [-0.1, 5.0], [5.0, -0.1], [0.0, 1.0], [np.nan, np.nan], [0.1, 0.1]])
    kept, report = filter_pairs(pairs, margins)
    assert [pair.query for pair in kept] == ["0", "4", "5"]
    assert report == PairFilterReport(total=6, kept=3, persona_ignored=3)
    assert str(report) == "3 of 6 pairs are of use (left out: 3 persona ignored)"


def test_pair_with_several_faults_is_counted_once() -> None:
    pairs = [PreferencePair("q", "same", "same"), PreferencePair("q", "", "b")]
    _, report = filter_pairs(pairs, np.full((2, 2), -1.0))
    assert report == PairFilterReport(total=2, kept=0, empty=1, identical=1)


def test_nothing_left_out_is_said_in_short() -> None:
    _, report = filter_pairs([PreferencePair("q", "a b", "c d", truncated=True)])
    assert str(report) == "1 of 1 pairs are of use"
