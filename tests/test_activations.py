from __future__ import annotations

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from alignez_gguf.activations import Activations, SelectedPairs, class_gap
from alignez_gguf.errors import ModelFileError, WorkDirectoryError


def rows(seed):
    return np.random.default_rng(seed).normal(size=(2, 3, 8)).astype(np.float16)


def test_rows_are_kept_in_float16_in_any_order():
    activations = Activations(3, 4, 8)
    activations.write(2, *rows(2))
    activations.write(0, *rows(0))
    assert activations.helpful.dtype == np.float16
    np.testing.assert_array_equal(activations.helpful[:, 2], rows(2)[0])
    np.testing.assert_array_equal(activations.harmful[:, 0], rows(0)[1])
    assert activations.done.tolist() == [True, False, True, False]


def test_interrupted_run_goes_on_from_the_directory(tmp_path):
    first = Activations(3, 4, 8, tmp_path / "activations")
    first.write(1, *rows(1))
    del first

    second = Activations(3, 4, 8, tmp_path / "activations")
    assert isinstance(second.helpful, np.memmap)
    assert second.done.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(second.harmful[:, 1], rows(1)[1])


def test_arrays_of_another_job_are_refused(tmp_path):
    Activations(3, 4, 8, tmp_path)
    with pytest.raises(WorkDirectoryError, match="another job"):
        Activations(3, 5, 8, tmp_path)
    (tmp_path / "helpful.npy").write_bytes(b"garbage")
    with pytest.raises(WorkDirectoryError, match="remove it"):
        Activations(3, 4, 8, tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -7e4])
def test_values_that_float16_cannot_hold_are_refused_with_the_layer(value):
    activations = Activations(3, 4, 8)
    harmful = rows(0)[1].astype(np.float32)
    harmful[2, 5] = value
    with pytest.raises(ModelFileError, match="layer 2"):
        activations.write(0, rows(0)[0], harmful)
    assert not activations.done.any()


def test_class_gap_is_the_difference_of_means_without_overflow():
    helpful = np.full((2, 100, 8), 6e4, np.float16)
    harmful = np.full((2, 100, 8), -6e4, np.float16)
    np.testing.assert_array_equal(class_gap(helpful, harmful), np.full((2, 8), 1.2e5, np.float32))


def test_class_gap_of_some_pairs():
    activations = Activations(3, 4, 8)
    for pair in range(4):
        activations.write(pair, *rows(pair))
    some = np.array([1, 3])
    found = class_gap(SelectedPairs(activations.helpful, some), SelectedPairs(activations.harmful, some))
    expected = np.mean([rows(pair)[0] - rows(pair)[1].astype(np.float64) for pair in (1, 3)], axis=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weight_is_how_often_a_pair_counts_in_the_gap():
    helpful, harmful = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float16)
    repeated = [0, 1, 1, 1, 2, 2, 3]
    np.testing.assert_allclose(
        class_gap(helpful, harmful, np.array([1.0, 3.0, 2.0, 1.0])),
        class_gap(helpful[:, repeated], harmful[:, repeated]),
        atol=1e-6,
    )


def test_selected_pairs_are_a_sequence_of_layers():
    layers = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float16)
    selected = SelectedPairs(layers, np.array([4, 0]))
    assert len(selected) == 3
    np.testing.assert_array_equal(np.stack(list(selected)), layers[:, [4, 0]])
    np.testing.assert_array_equal(np.stack(list(selected[1:])), layers[1:, [4, 0]])
    with pytest.raises(IndexError):
        selected[3]


def test_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        Activations(3, 4, 8, tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert not Activations(3, 4, 8, tmp_path).done.any()


GROWTH = """
import resource, sys
import numpy as np
from alignez_gguf.activations import Activations, SelectedPairs, class_gap

def peak_mb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

row = np.ones((16, 4096), np.float16)
before = peak_mb()
activations = Activations(16, 500, 4096, sys.argv[1])
for pair in range(500):
    activations.write(pair, row * pair, -row)
everything = np.arange(500)
gap = class_gap(*(SelectedPairs(side, everything) for side in (activations.helpful, activations.harmful)))
assert (gap == 250.5).all(), gap
print(activations.helpful.nbytes * 2 / 2**20, peak_mb() - before)
"""


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system cannot give mapped pages back")
def test_activations_on_disk_do_not_stay_resident(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    stored, grown = map(float, printed.split())
    assert stored == 125
    assert grown < 75
