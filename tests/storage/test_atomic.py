from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignez_gguf.errors import OutputError
from alignez_gguf.storage.atomic import replacing, require_writable, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_in_full_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    write_text(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    assert names(tmp_path) == ["out.txt"]


def test_text_that_is_not_unicode_is_written_with_replacements(tmp_path: Path) -> None:
    write_text(tmp_path / "out.txt", "a\udcff")
    assert (tmp_path / "out.txt").read_bytes() == b"a?"


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def test_new_file_is_whole_or_absent_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


def unwritable(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    return {
        "a folder": tmp_path / "folder",
        "in a missing folder": tmp_path / "none" / "out.txt",
        "under a file": tmp_path / "file" / "out.txt",
        "a device": Path(os.devnull),
    }


@pytest.mark.parametrize("where", ["a folder", "in a missing folder", "under a file", "a device"])
def test_place_that_cannot_be_written_is_refused_before_and_at_the_end(tmp_path: Path, where: str) -> None:
    path = unwritable(tmp_path)[where]
    before = names(tmp_path)
    for attempt in (lambda: require_writable(path), lambda: write_text(path, "text")):
        with pytest.raises(OutputError, match="choose another place") as refusal:
            attempt()
        assert str(path) in str(refusal.value)
    assert names(tmp_path) == before
    assert (tmp_path / "file").read_text() == "kept"
    assert Path(os.devnull).is_char_device()


def test_asking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("old")
    require_writable(tmp_path / "out.txt")
    require_writable(tmp_path / "new.txt")
    assert names(tmp_path) == ["out.txt"]
    assert (tmp_path / "out.txt").read_text() == "old"
