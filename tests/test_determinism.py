"""The same seed gives the same control file to the byte, however the work is spread and in whatever order its
parts arrive."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.pipeline import Settings, export
from alignez_gguf.progress import SilentReporter
from alignez_gguf.prompts.templates import METADATA_KEY, Templates
from alignez_gguf.storage.workdir import WorkDirectory

QUERIES = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:8]
QUICK = Settings(recipe="paper", method="svd-diff", max_tokens=12)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made(folder: Path, engine: Any, parallel: int, settings: Settings = QUICK) -> str:
    """The digest of the control file of one export."""
    path = folder / f"{parallel}.gguf"
    with LlamaEngine(demo.MODEL, n_threads=1, n_parallel=parallel) as model:
        wrapped = engine(model)
        templates = Templates.from_toml(model.model.metadata(METADATA_KEY) or "")
        with WorkDirectory(folder / f"{parallel}.work") as work:
            made = export(wrapped, QUERIES, templates, settings, work, SilentReporter(), target=wrapped)
    made.control.save(path)
    return digest(path)


class Reordered:
    """An engine whose completions arrive in another order."""

    def __init__(self, engine: LlamaEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Sequence[Any], sampling: Any) -> Iterator[Any]:
        arrived = list(self._engine.generate(requests, sampling))
        order = np.random.default_rng(0).permutation(len(arrived))
        return iter([arrived[index] for index in order])


def test_number_of_texts_at_once_and_order_of_arrival_decide_nothing(tmp_path: Path) -> None:
    whole = made(tmp_path, lambda engine: engine, parallel=32)
    assert made(tmp_path, lambda engine: engine, parallel=3) == whole
    assert made(tmp_path, Reordered, parallel=5) == whole


def test_seed_decides(tmp_path: Path) -> None:
    other = replace(QUICK, seed=1)
    assert made(tmp_path, lambda engine: engine, 16) != made(tmp_path, lambda engine: engine, 17, other)


FIT = """
import hashlib, sys
import numpy as np
from alignez_gguf import directions
random = np.random.default_rng(0)
for method, rank, n_embd in (
    ("mean", 1, 768), ("svd", 2, 768), ("svd-diff", 2, 768), ("logistic", 1, 768), ("ccs", 1, 64)
):
    helpful = random.normal(size=(2, 80, n_embd)).astype(np.float16)
    gap, noise = random.normal(size=(2, 1, n_embd)), random.normal(size=helpful.shape)
    harmful = (helpful + gap / 3 + noise / 2).astype(np.float16)
    found = directions.fit(method, helpful, harmful, rank=rank, seed=0)
    arrays = (found.vectors, found.p_helpful, found.p_harmful, found.accuracy)
    print(method, hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())
"""


def test_threads_of_the_libraries_decide_no_direction() -> None:
    def fitted(threads: int) -> str:
        variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        command = [sys.executable, "-c", FIT]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | variables)
        return done.stdout

    one = fitted(1)
    assert len(one.splitlines()) == 5
    assert fitted(2) == one


def test_a_saved_control_is_the_same_bytes_whatever_the_order_of_its_fields(tmp_path: Path) -> None:
    from alignez_gguf.control.edits import LayerEdit
    from alignez_gguf.control.model_info import ModelInfo

    edits = {layer: LayerEdit(add=np.full(8, layer + 1.0)) for layer in range(3)}
    recipe: dict[str, Any] = {"method": "svd", "seed": 1, "rate": 0.5}
    for name, order in (("a", 1), ("b", -1)):
        control = ControlFile(
            ModelInfo("llama", 8, 3),
            dict(list(edits.items())[::order]),
            dict(list(recipe.items())[::order]),
        )
        control.save(tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
