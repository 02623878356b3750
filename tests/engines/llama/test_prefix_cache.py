from __future__ import annotations

import errno
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest

from alignez_gguf.engines.llama import prefix_cache
from alignez_gguf.engines.llama.prefix_cache import PrefixCache

ONE, OTHER, THIRD = [1, 2], [1, 2, 3], [4]


@pytest.fixture
def cache() -> Iterator[PrefixCache]:
    cache = PrefixCache()
    yield cache
    cache.close()


def test_finds_what_was_kept_of_just_that_prompt(cache: PrefixCache) -> None:
    cache.add(ONE, b"one")
    cache.add(OTHER, b"other")
    assert [cache.find(prompt) for prompt in (OTHER, ONE, THIRD, [])] == [b"other", b"one", None, None]
    cache.close()
    assert cache.find(ONE) is None


def test_what_goes_beyond_the_limit_is_not_kept() -> None:
    cache = PrefixCache(limit=4)
    cache.add(ONE, b"abc")
    cache.add(ONE, b"again")  # is there
    cache.add(OTHER, b"de")
    cache.add(THIRD, b"f")
    assert [cache.find(prompt) for prompt in (ONE, OTHER, THIRD)] == [b"abc", None, b"f"]
    cache.close()


def test_most_of_the_disk_is_left_to_others(cache: PrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(prefix_cache.shutil, "disk_usage", lambda _: usage(12))
    cache.add(ONE, b"ab")
    cache.add(OTHER, b"cd")
    assert [cache.find(prompt) for prompt in (ONE, OTHER)] == [b"ab", None]


class Disk:
    """A file that takes or gives less than it is asked for, or none at all."""

    def __init__(self, file: Any, failing: str, whole: bool) -> None:
        self.file, self.failing, self.whole = file, failing, whole

    def __getattr__(self, name: str) -> Any:
        return self.fail if name == self.failing else getattr(self.file, name)

    def fail(self, asked: Any, *_: Any) -> Any:
        if not self.whole and self.failing == "read":
            return self.file.read(asked - 1)
        if not self.whole and len(asked) > 1:
            return len(asked) - 1  # the rest has no room
        raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize(
    ("failing", "whole"),
    [("seek", True), ("write", True), ("write", False), ("read", True), ("read", False)],
)
def test_disk_that_fails_loses_what_was_kept_and_no_more(
    failing: str, whole: bool, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: Disk(made(**how), failing, whole))
    cache.add(ONE, b"abc")
    cache.add(OTHER, b"de")
    assert cache.find(ONE) is None
    assert cache.find(OTHER) is None


def test_without_a_place_for_temporary_files_nothing_is_kept(
    cache: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "no usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    cache.add(ONE, b"abc")
    assert cache.find(ONE) is None
