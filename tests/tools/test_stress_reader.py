"""Hostile files end in an error of ours or a right load, and the stress that says so can tell otherwise."""

from __future__ import annotations

import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.gguf_header import MAX_KEYS, MAX_TENSORS
from alignez_gguf.errors import AlignezError, ControlFileError, ModelFileError, TemplateError
from alignez_gguf.prompts.templates import Templates

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from fuzz import Scale, reader
from fuzz.corpus import Tensor, counted, encode

FEW = Scale(inputs=600, kills=0, requests=0, cycles=0)
MEMORY_BYTES = 64 << 20
"""That reading a file of any size may take beside four times the file."""


def control_of(edits: dict[int, LayerEdit], n_embd: int = 32) -> ControlFile:
    return ControlFile(ModelInfo("llama", n_embd, 4), edits)


def number(key: bytes, value: int) -> bytes:
    return counted(key) + struct.pack("<II", 4, value)


def string(key: bytes, value: bytes) -> bytes:
    return counted(key) + struct.pack("<I", 8) + counted(value)


def controlvector(*metadata: bytes, n_embd: int = 32, name: bytes = b"direction.1") -> bytes:
    """A file as another tool writes it, with more metadata."""
    values = np.ones(n_embd, "<f4").tobytes()
    return encode(
        [string(b"general.architecture", b"controlvector"), *metadata], [Tensor(name, (n_embd,), 0, values)]
    )


def test_mutated_files_have_no_finding(tmp_path: Path) -> None:
    for outcome, tried in zip(reader.stress(FEW, tmp_path), (600, 30, 30), strict=True):
        assert outcome.findings == ()
        assert outcome.tried == tried


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda path: {}["a key"], "KeyError"),
        (lambda path: (_ for _ in ()).throw(AlignezError("two\nlines")), "several lines"),
        (lambda path: bytearray(64 << 20), "bytes of memory"),
        (lambda path: time.sleep(0.05), "0.1 s"),
        (lambda path: np.float32(3e38) * np.float32(10), "RuntimeWarning"),
        (lambda path: time.sleep(2), "TimeoutError"),
    ],
)
def test_reader_that_breaks_a_promise_is_found_out(
    broken: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "check_control", lambda path, again: broken(path))
    monkeypatch.setattr(reader, "SLOWEST_S", 0.04)
    monkeypatch.setattr(reader, "_HANG_S", 0.5)
    outcome, *_ = reader.stress(replace(FEW, inputs=2), tmp_path)
    found = next(finding for finding in outcome.findings if said in finding)
    assert Path(found.split(": ")[0]).exists()


def test_control_that_comes_back_otherwise_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_of({1: LayerEdit(add=np.ones(32))}).save(tmp_path / "c.gguf")
    reader.check_control(tmp_path / "c.gguf", tmp_path / "again.gguf")
    other = control_of({1: LayerEdit(add=np.full(32, 2.0))})
    save = ControlFile.save
    monkeypatch.setattr(ControlFile, "save", lambda _, path: save(other, path))
    with pytest.raises(reader.WrongError, match="layer 1"):
        reader.check_control(tmp_path / "c.gguf", tmp_path / "again.gguf")


def measured(read: Callable[[], object]) -> int:
    """Peak of the memory that reading takes; what it raises does not count."""
    tracemalloc.start()
    try:
        read()
    except AlignezError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("n_arrays", [10, 3000])
def test_metadata_takes_no_more_memory_than_the_promise(n_arrays: int, tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    # Small numbers cost the most: a byte in the file, a reference of eight in a tuple.
    items = struct.pack("<IIQ", 9, 0, 4096) + bytes(4096)
    path.write_bytes(controlvector(*(counted(b"k%d" % index) + items for index in range(n_arrays))))
    assert measured(lambda: ControlFile.load(path)) < 4 * path.stat().st_size + MEMORY_BYTES


def test_large_removal_takes_no_more_memory_and_time_than_the_promise(tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((2048, 1024)))[0].T
    control_of({1: LayerEdit(remove=rows)}, n_embd=2048).save(path)
    assert measured(lambda: ControlFile.load(path)) < 4 * path.stat().st_size + MEMORY_BYTES


def test_removal_of_a_rank_that_takes_long_to_check_is_refused() -> None:
    with pytest.raises(ControlFileError, match="rank 1025"):
        control_of({1: LayerEdit(remove=np.eye(1025, 1100))}, n_embd=1100)


@pytest.mark.parametrize(("n_tensors", "n_keys"), [(MAX_TENSORS + 1, 0), (0, MAX_KEYS + 1), (2**63, 2**63)])
def test_more_entries_than_any_model_has_are_refused_at_once(
    n_tensors: int, n_keys: int, tmp_path: Path
) -> None:
    path = tmp_path / "c.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + bytes(1 << 20))
    with pytest.raises(ControlFileError, match="more than any model has"):
        ControlFile.load(path)


def test_addition_whose_length_is_beyond_float32_is_refused() -> None:
    with pytest.raises(ControlFileError, match="layer 2 is too long"):
        control_of({2: LayerEdit(add=np.full(32, 3e38))})
    assert np.isfinite(control_of({2: LayerEdit(add=np.full(32, 1e30))}).edits[2].scale)


def test_name_that_would_write_to_the_terminal_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    path.write_bytes(controlvector(string(b"controlvector.model_hint", b"x\x1b[2J\nError: ")))
    assert ControlFile.load(path).model.arch == ""
    path.write_bytes(controlvector(string(b"general.architecture.x", b""), name=b"direction.1\x1b[2J"))
    with pytest.raises(ControlFileError) as refusal:
        ControlFile.load(path)
    assert str(refusal.value).isprintable()


def test_model_with_a_number_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = [
        string(b"general.architecture", b"llama"),
        string(b"llama.block_count", b"9" * 5000),
        number(b"llama.embedding_length", 32),
    ]
    path.write_bytes(encode(metadata, [Tensor(b"t", (32,), 0, bytes(128))]))
    with pytest.raises(ModelFileError, match="block_count"):
        ModelInfo.from_gguf(path)


def test_templates_with_a_key_that_takes_seconds_are_refused_at_once() -> None:
    with pytest.raises(TemplateError, match="dots"):
        Templates.from_toml("x." * 5_000 + "y = 1")


@pytest.mark.parametrize("value", ["[" * 20_000, "{a=" * 5_000, "9" * 5_000])
def test_templates_without_end_are_refused(value: str) -> None:
    with pytest.raises(TemplateError, match="not valid TOML"):
        Templates.from_toml(f"x = {value}")
