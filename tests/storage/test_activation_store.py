"""What is read of texts, in a file that survives what happens to it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.directions.gap import class_gap
from alignez_gguf.errors import ModelFileError, WorkDirectoryError
from alignez_gguf.storage.activation_store import ActivationStore

N_LAYER, N_EMBD = 3, 8
RECORD = 32 + 2 * N_LAYER * N_EMBD


def opened(folder: Path) -> ActivationStore:
    """Those in a folder; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ActivationStore(folder / "read.f16", N_LAYER, N_EMBD)


def values(seed: int) -> NDArray[np.float16]:
    return np.random.default_rng(seed).normal(size=(N_LAYER, N_EMBD)).astype(np.float16)


def written(folder: Path, n_texts: int) -> ActivationStore:
    """Texts named 0, 1, ... with the values of these seeds."""
    activations = opened(folder)
    for seed in range(n_texts):
        activations.write(str(seed), values(seed))
    return activations


def test_layers_of_texts_come_in_any_order_and_number(tmp_path: Path) -> None:
    activations = written(tmp_path, 4)
    layers = activations.of(["2", "0", "2"])
    assert len(layers) == N_LAYER
    expected = np.stack([values(2), values(0), values(2)], axis=1)
    assert layers[0].dtype == np.float16
    np.testing.assert_array_equal(np.stack(list(layers)), expected)
    np.testing.assert_array_equal(np.stack(layers[1:]), expected[1:])
    np.testing.assert_array_equal(layers[-1], expected[-1])
    with pytest.raises(IndexError):
        layers[N_LAYER]
    assert activations.of([])[0].shape == (0, N_EMBD)


def test_text_that_was_not_read_is_not_there(tmp_path: Path) -> None:
    activations = written(tmp_path, 2)
    assert "1" in activations
    assert "2" not in activations
    with pytest.raises(KeyError):
        activations.of(["1", "2"])


def test_texts_that_differ_in_anything_are_told_apart(tmp_path: Path) -> None:
    activations = opened(tmp_path)
    names = ["", "a", "a ", "A", "\0", "\u00e9", "e\u0301", "\ud800", "x" * 100_000]
    for seed, name in enumerate(names):
        assert name not in activations
        activations.write(name, values(seed))
    for seed, name in enumerate(names):
        np.testing.assert_array_equal(np.stack(list(opened(tmp_path).of([name])))[:, 0], values(seed))


def test_file_appears_with_the_first_text(tmp_path: Path) -> None:
    activations = opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
    activations.write("0", values(0))
    assert (tmp_path / "read.f16").stat().st_size == RECORD


@pytest.mark.parametrize("left", [1, 31, 32, RECORD - 1])
def test_interrupted_run_goes_on_after_the_last_whole_text(tmp_path: Path, left: int) -> None:
    written(tmp_path, 3)
    path = tmp_path / "read.f16"
    os.truncate(path, 2 * RECORD + left)
    again = opened(tmp_path)
    assert ["0" in again, "1" in again, "2" in again] == [True, True, False]
    again.write("3", values(3))
    assert path.stat().st_size == 3 * RECORD
    last = opened(tmp_path)
    np.testing.assert_array_equal(np.stack(list(last.of(["1", "3"]))), np.stack([values(1), values(3)], 1))


def test_flipped_bit_costs_that_text_alone_and_its_room_is_used_again(tmp_path: Path) -> None:
    written(tmp_path, 5)
    path = tmp_path / "read.f16"
    intact = path.read_bytes()
    for at in (0, 16, 32, RECORD - 1):  # in the text, the checksum, the values
        data = bytearray(intact)
        data[2 * RECORD + at] ^= 1
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="1 damaged texts, which are read again"):
            again = ActivationStore(path, N_LAYER, N_EMBD)
        assert [str(seed) in again for seed in range(5)] == [True, True, False, True, True]
        again.write("2", values(2))
        assert path.read_bytes() == intact


def test_garbage_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "read.f16"
    path.write_bytes(os.urandom(7 * RECORD + 5))
    with pytest.warns(UserWarning, match="7 damaged"):
        activations = ActivationStore(path, N_LAYER, N_EMBD)
    for seed in range(9):
        activations.write(str(seed), values(seed))
    again = opened(tmp_path)
    for seed in range(9):
        np.testing.assert_array_equal(np.stack(list(again.of([str(seed)])))[:, 0], values(seed))
    assert path.stat().st_size == 9 * RECORD


def test_file_that_cannot_be_used_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "read.f16").mkdir()
    with pytest.raises(WorkDirectoryError, match=r"cannot read .*; make room for it, or choose another"):
        opened(tmp_path)
    with pytest.raises(WorkDirectoryError, match=r"cannot write .*No such file"):
        opened(tmp_path / "nowhere").write("0", values(0))
    (tmp_path / "short").mkdir()
    layers = written(tmp_path / "short", 2).of(["0", "1"])
    os.truncate(tmp_path / "short" / "read.f16", 2 * RECORD - 1)
    assert layers[0].shape == (2, N_EMBD)
    with pytest.raises(WorkDirectoryError, match="shorter than it was"):
        layers[N_LAYER - 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -7e4])
def test_values_that_float16_cannot_hold_are_refused_with_the_layer(tmp_path: Path, value: float) -> None:
    activations = opened(tmp_path)
    found = values(0).astype(np.float32)
    found[2, 5] = value
    with pytest.raises(ModelFileError, match="layer 2"):
        activations.write("0", found)
    assert "0" not in activations
    assert list(tmp_path.iterdir()) == []


def test_other_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be \[3, 8\], not \[2, 8\]"):
        opened(tmp_path).write("0", values(0)[:2])


def test_class_gap_is_the_difference_of_means_without_overflow() -> None:
    helpful = np.full((2, 100, 8), 6e4, np.float16)
    harmful = np.full((2, 100, 8), -6e4, np.float16)
    np.testing.assert_array_equal(class_gap(helpful, harmful), np.full((2, 8), 1.2e5, np.float32))


def test_class_gap_of_what_was_read(tmp_path: Path) -> None:
    activations = written(tmp_path, 4)
    found = class_gap(activations.of(["1", "3"]), activations.of(["0", "2"]))
    expected = np.mean([values(1), values(3)], axis=0, dtype=np.float64)
    expected -= np.mean([values(0), values(2)], axis=0, dtype=np.float64)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weight_is_how_often_a_pair_counts_in_the_gap() -> None:
    helpful, harmful = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float16)
    repeated = [0, 1, 1, 1, 2, 2, 3]
    np.testing.assert_allclose(
        class_gap(helpful, harmful, np.array([1.0, 3.0, 2.0, 1.0])),
        class_gap(helpful[:, repeated], harmful[:, repeated]),
        atol=1e-6,
    )


GROWTH = """
import resource, sys
import numpy as np
from pathlib import Path
from alignez_gguf.storage.activation_store import ActivationStore
from alignez_gguf.directions.gap import class_gap

def peak_mb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

row = np.ones((16, 4096), np.float16)
names = [(f"helpful {pair}", f"harmful {pair}") for pair in range(500)]
before = peak_mb()
activations = ActivationStore(Path(sys.argv[1]), 16, 4096)
for pair, (helpful, harmful) in enumerate(names):
    activations.write(helpful, row * pair)
    activations.write(harmful, -row)
again = ActivationStore(Path(sys.argv[1]), 16, 4096)
gap = class_gap(*map(again.of, zip(*names)))
assert (gap == 250.5).all(), gap
print(Path(sys.argv[1]).stat().st_size / 2**20, peak_mb() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="`resource` is not there")
def test_activations_do_not_stay_in_memory(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "read.f16")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    stored, grown = map(float, printed.split())
    assert stored == pytest.approx(125, abs=0.1)
    assert grown < 50
