from __future__ import annotations

import random

import pytest

from alignez_gguf.engines.text import StopStringFilter


def fed(pieces: list[bytes], *stop: str) -> tuple[list[str], StopStringFilter]:
    text = StopStringFilter(stop)
    given = []
    for piece in pieces:
        given.append(text.feed(piece))
        if text.stopped:
            break
    given.append(text.finish())
    return given, text


def test_text_ends_before_a_stop_string() -> None:
    _, text = fed([b"an answer\nHuman: more"], "\nHuman:")
    assert text.stopped
    assert text.text == "an answer"


def test_stop_string_that_straddles_tokens_is_never_shown_in_part() -> None:
    given, text = fed([b"yes\n", b"Hu", b"man", b":", b" more"], "\nHuman:")
    assert given == ["yes", "", "", "", ""]
    assert text.stopped


def test_beginning_of_a_stop_string_is_shown_once_it_goes_on_otherwise() -> None:
    given, text = fed([b"yes\nHu", b"ngry"], "\nHuman:")
    assert given == ["yes", "\nHungry", ""]
    assert not text.stopped


def test_beginning_of_a_stop_string_at_the_end_belongs_to_the_text() -> None:
    _, text = fed([b"yes\nHuman"], "\nHuman:")
    assert text.text == "yes\nHuman"


def test_the_first_of_several_stop_strings_ends_the_text() -> None:
    _, text = fed([b"one, two. three"], ".", ",")
    assert text.text == "one"


def test_stop_string_that_repeats_its_own_beginning_is_found() -> None:
    _, text = fed([b"xa", b"a", b"ab", b"c"], "aab")
    assert text.text == "xa"


def test_character_split_over_tokens_appears_whole() -> None:
    given, _ = fed([b"caf\xc3", b"\xa9!"])
    assert given == ["caf", "é!", ""]


def test_incomplete_character_at_the_end_is_dropped() -> None:
    _, text = fed([b"caf\xc3"])
    assert text.text == "caf"


@pytest.mark.parametrize("seed", range(20))
def test_any_division_into_tokens_gives_the_same_text(seed: int) -> None:
    source = "Grüße, ababab 🦙 and then abc the end"
    data, rng = source.encode(), random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(data)), 9))
    pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    given, text = fed(pieces, "abc", "zzz")
    assert text.text == "".join(given) == source[: source.index("abc")]
