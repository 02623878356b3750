from __future__ import annotations

import errno
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest

from alignez_gguf.engines import prompt_cache
from alignez_gguf.engines.prompt_cache import PromptCache

ONE, OTHER, THIRD = [1, 2], [1, 2, 3], [4]


@pytest.fixture
def cache() -> Iterator[PromptCache]:
    cache = PromptCache()
    yield cache
    cache.close()


def test_finds_what_was_kept_of_just_that_prompt(cache: PromptCache) -> None:
    cache.keep(ONE, b"one")
    cache.keep(OTHER, b"other")
    assert [cache.find(prompt) for prompt in (OTHER, ONE, THIRD, [])] == [b"other", b"one", None, None]
    cache.close()
    assert cache.find(ONE) is None


def test_what_goes_beyond_the_limit_is_not_kept() -> None:
    cache = PromptCache(limit=4)
    cache.keep(ONE, b"abc")
    cache.keep(ONE, b"again")  # is there
    cache.keep(OTHER, b"de")
    cache.keep(THIRD, b"f")
    assert [cache.find(prompt) for prompt in (ONE, OTHER, THIRD)] == [b"abc", None, b"f"]
    cache.close()


def test_most_of_the_disk_is_left_to_others(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(prompt_cache.shutil, "disk_usage", lambda _: usage(12))
    cache.keep(ONE, b"ab")
    cache.keep(OTHER, b"cd")
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
    failing: str, whole: bool, cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: Disk(made(**how), failing, whole))
    cache.keep(ONE, b"abc")
    cache.keep(OTHER, b"de")
    assert cache.find(ONE) is None
    assert cache.find(OTHER) is None


def test_without_a_place_for_temporary_files_nothing_is_kept(
    cache: PromptCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "no usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    cache.keep(ONE, b"abc")
    assert cache.find(ONE) is None
