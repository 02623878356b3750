"""GLP files: what their specification asks for, and what keeps llama.cpp from adding them."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import ControlFileError, SteeringError
from alignez_gguf.exporters import glp

MODEL = ModelInfo("llama", n_embd=16, n_layer=4, name="Tiny")
random = np.random.default_rng(0).standard_normal


@pytest.mark.parametrize(("rank", "version"), [(1, 1), (3, 2)])
def test_a_file_holds_orthonormal_directions_and_says_how_to_apply_them(
    rank: int, version: int, tmp_path: Path
) -> None:
    edits = {layer: LayerEdit(remove=random((rank, 16))) for layer in (1, 3)}
    path = tmp_path / "out.gguf"

    assert glp.write(ControlFile(MODEL, edits), path) == [path]

    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items() if name.startswith("glp.")}
    assert said == {
        "glp.spec_version": version,
        "glp.generator": "alignez-gguf",
        "glp.mode": "project",
        "glp.alpha_default": 1.0,
        "glp.rank": rank,
        "glp.orthonormal": True,
        "glp.hook_point": "ffn_out_pre_residual",
        "glp.derived_at": "ffn_out_pre_residual",
        "glp.layer_ids_zero_based": "1,3",
    }
    directions = {t.name: t.data for t in reader.tensors if t.name.startswith("direction.")}
    for layer, edit in edits.items():
        assert edit.remove is not None
        names = [f"direction.{layer}", *(f"direction.{layer}.{j}" for j in range(1, rank))]
        assert np.array_equal([directions.pop(name) for name in names], edit.remove)
    assert not directions


def test_llama_cpp_finds_a_tensor_that_it_refuses(tmp_path: Path) -> None:
    glp.write(ControlFile(MODEL, {2: LayerEdit(remove=random(16))}), tmp_path / "out.gguf")

    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors]

    assert [name for name in names if not re.fullmatch(r"direction\.[1-9]\d*", name)] == [glp.GUARD]


def test_we_do_not_take_a_glp_file_for_a_control_vector(tmp_path: Path) -> None:
    glp.write(ControlFile(MODEL, {2: LayerEdit(remove=random(16))}), tmp_path / "out.gguf")

    with pytest.raises(ControlFileError):
        ControlFile.load(tmp_path / "out.gguf")


REFUSED = {
    "an addition": ({1: LayerEdit(remove=random(16), add=random(16))}, "adds at layer 1"),
    "layer 0": ({0: LayerEdit(remove=random(16))}, "--layers 1-"),
    "two ranks": ({1: LayerEdit(remove=random((1, 16))), 2: LayerEdit(remove=random((2, 16)))}, "one rank"),
}


@pytest.mark.parametrize(("edits", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_format_cannot_carry_is_refused_and_nothing_is_written(
    edits: dict[int, LayerEdit], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SteeringError, match=message):
        glp.write(ControlFile(MODEL, edits), tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
