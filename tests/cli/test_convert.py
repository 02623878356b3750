"""`alignez-gguf convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.control.gate import Gate
from tests.cli.conftest import Run

random = np.random.default_rng(0).standard_normal


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[dict[int, LayerEdit]], str]:
    """Save a control file for the demo model."""

    def save(edits: dict[int, LayerEdit]) -> str:
        path = tmp_path / "control.gguf"
        ControlFile(ModelInfo.from_gguf(demo.MODEL), edits).save(path)
        return str(path)

    return save


def vector() -> np.ndarray:
    return random(ModelInfo.from_gguf(demo.MODEL).n_embd)


def test_stock_prints_the_files_and_the_command_line_that_uses_them(
    run: Run, model: str, saved: Callable[[dict[int, LayerEdit]], str]
) -> None:
    control = saved({1: LayerEdit(remove=vector(), add=vector())})

    result = run("convert", control, model, "--format", "stock", "-o", "out")

    assert result.exit_code == 0
    assert result.stdout.split() == ["out.lora.gguf", "out.cvec.gguf"]
    assert all(Path(name).is_file() for name in result.stdout.split())
    assert f"llama-server -m {model} --lora out.lora.gguf --control-vector out.cvec.gguf" in result.stderr


def test_merged_reports_the_error_of_every_weight(
    run: Run, model: str, saved: Callable[[dict[int, LayerEdit]], str]
) -> None:
    control = saved({0: LayerEdit(remove=vector()), 1: LayerEdit(add=vector())})

    result = run("convert", control, model, "--format", "merged", "-o", "out.gguf")

    assert result.exit_code == 0
    assert result.stdout.split() == ["out.gguf"]
    assert "blk.0.ffn_down.weight" in result.stderr
    assert "%" in result.stderr
    assert ModelInfo.from_gguf("out.gguf").arch == ModelInfo.from_gguf(model).arch


def test_peft_and_glp_are_written(run: Run, model: str, saved: Callable[[dict[int, LayerEdit]], str]) -> None:
    control = saved({1: LayerEdit(remove=vector())})

    peft = run("convert", control, model, "--format", "peft", "-o", "adapter", "--quiet")
    glp = run("convert", control, model, "--format", "glp", "-o", "out.glp.gguf", "--quiet")

    assert peft.stdout.split() == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert json.loads(Path("adapter/adapter_config.json").read_text())["target_modules"] == ["down_proj"]
    assert glp.stdout.split() == ["out.glp.gguf"]
    assert peft.stderr == glp.stderr == ""


@pytest.mark.parametrize(
    ("form", "mend"),
    [("stock", "--layers 1-"), ("glp", "--format stock"), ("peft", "--format stock")],
)
def test_what_a_form_cannot_carry_is_refused_with_the_mend(
    refused: Callable[..., str],
    model: str,
    saved: Callable[[dict[int, LayerEdit]], str],
    form: str,
    mend: str,
) -> None:
    control = saved({0: LayerEdit(add=vector())})

    assert mend in refused("convert", control, model, "--format", form, "-o", "out", "--quiet")


@pytest.mark.parametrize("form", ["stock", "merged", "peft", "glp"])
def test_a_scope_is_not_widened_unsaid(
    run: Run, refused: Callable[..., str], model: str, tmp_path: Path, form: str
) -> None:
    info = ModelInfo.from_gguf(demo.MODEL)
    for scope in ("generation", "first:3"):
        control = ControlFile(info, {1: LayerEdit(remove=vector())}, recipe={"scope": scope})
        control.save(tmp_path / f"{scope[:5]}.gguf")

    message = refused("convert", "first.gguf", model, "--format", form, "-o", "out", "--quiet")
    result = run("convert", "gener.gguf", model, "--format", form, "-o", "out")

    assert "--scope all" in message
    assert "note: it edits every token" in result.stderr


def test_a_control_for_another_model_is_refused(
    refused: Callable[..., str], model: str, tmp_path: Path
) -> None:
    other = ModelInfo("llama", n_embd=32, n_layer=2)
    ControlFile(other, {1: LayerEdit(remove=random(32))}).save(tmp_path / "other.gguf")

    message = refused("convert", "other.gguf", model, "--format", "stock", "-o", "out")

    assert "use one made for this model" in message


def test_a_folder_that_is_missing_is_named(
    refused: Callable[..., str], model: str, saved: Callable[[dict[int, LayerEdit]], str]
) -> None:
    control = saved({1: LayerEdit(remove=vector())})

    for form in ("native", "stock", "merged", "glp", "peft"):
        message = refused("convert", control, model, "--format", form, "-o", "missing/out", "--quiet")
        assert "missing/out" in message


@pytest.mark.parametrize("form", ["stock", "merged", "peft", "glp"])
def test_gate_that_a_form_cannot_carry_is_an_error(run: Run, model: str, tmp_path: Path, form: str) -> None:
    gate = Gate(np.arange(3, dtype=np.int32), np.ones(3, np.float32), 0.0)
    control = ControlFile(ModelInfo.from_gguf(demo.MODEL), {1: LayerEdit(remove=vector())}, gate=gate)
    control.save(tmp_path / "gated.gguf")

    result = run("convert", str(tmp_path / "gated.gguf"), model, "--format", form, "-o", "out")

    assert result.exit_code == 1
    assert f"its gate opens, and {form} files steer every one; export with --gate off" in result.stderr
    assert not list(Path().glob("out*"))


def test_native_form_keeps_the_gate(run: Run, model: str, tmp_path: Path) -> None:
    gate = Gate(np.arange(3, dtype=np.int32), np.ones(3, np.float32), 0.0)
    control = ControlFile(ModelInfo.from_gguf(demo.MODEL), {1: LayerEdit(remove=vector())}, gate=gate)
    control.save(tmp_path / "gated.gguf")
    assert (
        run("convert", str(tmp_path / "gated.gguf"), model, "--format", "native", "-o", "out").exit_code == 0
    )
    kept = ControlFile.load("out").gate
    assert kept is not None
    assert kept.digest == gate.digest
