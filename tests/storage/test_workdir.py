from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import WorkDirectoryError
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.storage.workdir import WorkDirectory

INFO = ModelInfo("llama", 64, 3, "m", "f" * 64, "Q8_0")


def test_part_is_found_again_and_changes_with_everything_that_determines_it(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path) as work:
        part = work.part("pairs", model=INFO, templates=Templates.default(), seed=0)
        assert part.parent == tmp_path
        others = [
            work.part("pairs", model=INFO, templates=Templates.default(), seed=1),
            work.part("activations", model=INFO, templates=Templates.default(), seed=0),
            work.part("pairs", model=INFO, templates=None, seed=0),
        ]
    with WorkDirectory(tmp_path) as work:
        assert work.part("pairs", seed=0, templates=Templates.default(), model=INFO) == part
    assert len({part, *others}) == 4


def test_models_of_one_shape_do_not_share_a_part(tmp_path: Path) -> None:
    other = ModelInfo("llama", 64, 3, "m", "0" * 64, "Q8_0")
    with WorkDirectory(tmp_path) as work:
        assert work.part("pairs", model=INFO) != work.part("pairs", model=other)


def test_text_that_is_not_unicode_determines_a_part_too(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path) as work:
        assert work.part("pairs", query="a\udcff") != work.part("pairs", query="a")


def test_second_process_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    code = f"from alignez_gguf.storage.workdir import WorkDirectory; WorkDirectory({str(tmp_path)!r}).close()"

    def enter_elsewhere() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    with WorkDirectory(tmp_path):
        refused = enter_elsewhere()
    assert refused.returncode != 0
    assert f"another process is at work in {tmp_path}" in refused.stderr
    assert enter_elsewhere().returncode == 0


def test_lock_ends_with_its_process_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import os; from alignez_gguf.storage.workdir import WorkDirectory; "
        f"work = WorkDirectory({str(tmp_path)!r}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    WorkDirectory(tmp_path).close()


def test_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "work"):
        with pytest.raises(WorkDirectoryError, match="choose another --work-dir"):
            WorkDirectory(path)


def test_new_folder_goes_again_where_nothing_was_done(tmp_path: Path) -> None:
    for name, content, kept in (("untouched", None, False), ("empty", "", False), ("worked", "row", True)):
        with WorkDirectory(tmp_path / name) as work:
            if content is not None:
                (work.path / "pairs.jsonl").write_text(content)
        assert (tmp_path / name).exists() == kept


def test_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    WorkDirectory(tmp_path).close()
    assert tmp_path.exists()


def test_results_are_computed_once_for_their_inputs_and_come_back_as_they_were(tmp_path: Path) -> None:
    calls: list[int] = []

    def arrays(seed: int) -> dict[str, np.ndarray]:
        calls.append(seed)
        return {"vectors": np.full((2, 3), seed, np.float32), "threshold": np.float64(seed)}

    for seed in (1, 2, 1, 2):
        with WorkDirectory(tmp_path) as work:
            found = work.cached_arrays("fit", lambda seed=seed: arrays(seed), seed=seed)
            assert found.keys() == {"vectors", "threshold"}
            np.testing.assert_array_equal(found["vectors"], np.full((2, 3), seed, np.float32), strict=True)
            assert float(found["threshold"]) == seed
            assert (
                work.cached_array("one", lambda seed=seed: arrays(seed)["vectors"], seed=seed)[0, 0] == seed
            )
            assert work.cached_json("names", lambda: {"a": (1, "b")}, seed=0) == {"a": [1, "b"]}
    assert calls == [1, 1, 2, 2]
