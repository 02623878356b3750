from __future__ import annotations

import dataclasses
import math
import struct
import warnings

import gguf
import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile, LayerReport, ModelInfo
from alignez_gguf.control.edits import LayerEdit, edits_sha256, orthonormal_rows
from alignez_gguf.control.gate import Gate
from alignez_gguf.directions.base import Directions
from alignez_gguf.errors import ControlFileError, SteeringError

MODEL = ModelInfo("llama", 32, 6, "tiny", "a" * 64, "Q4_K_M")


@pytest.fixture
def control():
    rng = np.random.default_rng(3)
    column = np.linspace(0, 1, 6, dtype=np.float32)
    return ControlFile(
        MODEL,
        {
            0: LayerEdit(add=rng.normal(size=32)),
            2: LayerEdit(remove=rng.normal(size=(3, 32))),
            5: LayerEdit(add=rng.normal(size=32), remove=rng.normal(size=32)),
            3: LayerEdit(),
        },
        recipe={"method": "ccs", "seed": 7, "mix": False, "note": "", "layers": [1, 2]},
        layers=LayerReport(column, column, 1 - column, loss=column / 2, spread=column / 4),
        score={"kl": 0.0625, "candidates": ("a", "b"), "gains": np.array([0.5, -0.25])},
    )


def write_gguf(path, tensors, keys=(), arch="controlvector"):
    """A GGUF file made by the gguf package; `keys` are (name, value, type[, type of items])."""
    writer = gguf.GGUFWriter(path, arch)
    for key in keys:
        writer.add_key_value(*key)
    for name, tensor in tensors:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


U32, STRING, ARRAY, FLOAT32 = (
    gguf.GGUFValueType.UINT32,
    gguf.GGUFValueType.STRING,
    gguf.GGUFValueType.ARRAY,
    gguf.GGUFValueType.FLOAT32,
)


def our_keys(**changes):
    keys = {
        "alignez.format_version": (1, U32),
        "alignez.model.arch": ("llama", STRING),
        "alignez.model.name": ("tiny", STRING),
        "alignez.model.fingerprint": ("", STRING),
        "alignez.model.quantization": ("", STRING),
        "alignez.model.n_embd": (32, U32),
        "alignez.model.n_layer": (6, U32),
    }
    keys.update({name.replace("__", "."): value for name, value in changes.items()})
    return [(name, *value) for name, value in keys.items() if value is not None]


def ones(*shape):
    return np.ones(shape, np.float32)


UNIT = np.eye(32, dtype=np.float32)


def test_file_comes_back_as_it_was_saved(control, tmp_path):
    control.save(tmp_path / "c.gguf")
    loaded = ControlFile.load(tmp_path / "c.gguf")

    assert loaded.model == MODEL
    assert list(loaded.edits) == [0, 2, 5]
    for layer, edit in loaded.edits.items():
        for name in ("add", "remove"):
            np.testing.assert_array_equal(getattr(edit, name), getattr(control.edits[layer], name))
    assert loaded.recipe == {"layers": (1, 2), "method": "ccs", "mix": False, "note": "", "seed": 7}
    assert loaded.score == {"candidates": ("a", "b"), "gains": (0.5, -0.25), "kl": 0.0625}
    for field in dataclasses.fields(LayerReport):
        np.testing.assert_array_equal(getattr(loaded.layers, field.name), getattr(control.layers, field.name))


def test_equal_content_gives_equal_bytes(control, tmp_path):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    control.save(first)
    ControlFile.load(first).save(second)
    assert first.read_bytes() == second.read_bytes()


def test_other_gguf_tools_read_the_file(control, tmp_path):
    control.save(tmp_path / "c.gguf")
    reader = gguf.GGUFReader(tmp_path / "c.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    assert reader.fields["GGUF.version"].contents() == 3
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 3
    assert reader.fields["alignez.layer.decision"].contents() == [
        "add", "none", "remove", "none", "none", "remove+add",
    ]  # fmt: skip
    assert list(tensors) == ["direction.0", "projection.2", "direction.5", "projection.5"]
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in tensors.values())
    assert list(tensors["projection.2"].shape) == [32, 3]  # ggml order: n_embd first
    assert list(tensors["projection.5"].shape) == [32]
    np.testing.assert_array_equal(tensors["projection.2"].data, control.edits[2].remove)
    np.testing.assert_array_equal(tensors["direction.5"].data, control.edits[5].add)


def test_addition_above_layer_zero_uses_only_tensors_that_stock_llama_cpp_takes(tmp_path):
    ControlFile(MODEL, {layer: LayerEdit(add=ones(32)) for layer in range(1, 6)}).save(tmp_path / "c.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "c.gguf").tensors]
    assert names == [f"direction.{layer}" for layer in range(1, 6)]


@pytest.mark.parametrize(
    "keys",
    [
        [("controlvector.model_hint", "mistral", STRING), ("controlvector.layer_count", 2, U32)],
        [],
    ],
)
def test_file_of_another_tool_loads(tmp_path, keys):
    path = write_gguf(tmp_path / "c.gguf", [("direction.1", 2 * ones(32)), ("direction.4", ones(32))], keys)
    control = ControlFile.load(path)
    assert control.model == ModelInfo("mistral" if keys else "", 32, 0)
    assert sorted(control.edits) == [1, 4]
    np.testing.assert_array_equal(control.edits[1].add, 2 * ones(32))


def test_file_of_another_tool_warns_of_another_hint_and_refuses_another_shape(tmp_path):
    keys = [("controlvector.model_hint", "mistral", STRING)]
    control = ControlFile.load(write_gguf(tmp_path / "c.gguf", [("direction.4", ones(32))], keys))
    with pytest.warns(UserWarning, match=r"'mistral'.*llama"):
        control.check_fits(MODEL)
    with pytest.raises(ControlFileError, match=r"width 32.*width 64"):
        control.check_fits(dataclasses.replace(MODEL, n_embd=64))
    with pytest.raises(ControlFileError, match=r"edits layer 4, but .* 4 layers .*from 0 to 3; use one made"):
        control.check_fits(dataclasses.replace(MODEL, n_layer=4))


def test_layers_beyond_the_model_are_named(tmp_path):
    tensors = [(f"direction.{layer}", ones(32)) for layer in (1, 5, 6, 9)]
    control = ControlFile.load(write_gguf(tmp_path / "c.gguf", tensors))
    with pytest.raises(ControlFileError, match="edits layer 6 and 1 above it, but the model is llama"):
        control.check_fits(MODEL)


def test_file_of_another_tool_is_saved_only_once_its_model_is_known(tmp_path):
    control = ControlFile.load(write_gguf(tmp_path / "c.gguf", [("direction.4", ones(32))]))
    with pytest.raises(ControlFileError, match=r"ModelInfo\.from_gguf"):
        control.save(tmp_path / "ours.gguf")
    dataclasses.replace(control, model=MODEL).save(tmp_path / "ours.gguf")
    assert ControlFile.load(tmp_path / "ours.gguf").model == MODEL


def test_file_fits_the_model_it_was_made_for_without_a_word(control):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        control.check_fits(MODEL)
        control.check_fits(dataclasses.replace(MODEL, fingerprint=""))


@pytest.mark.parametrize(
    ("change", "named"), [({"arch": "qwen2"}, "qwen2"), ({"n_embd": 64}, "64"), ({"n_layer": 7}, "7")]
)
def test_file_for_another_model_is_refused_with_both_sides_named(control, change, named):
    with pytest.raises(ControlFileError, match=rf"llama with 6 layers of width 32.*{named}"):
        control.check_fits(dataclasses.replace(MODEL, **change))


def test_other_fingerprint_of_equal_shape_warns(control):
    with pytest.warns(UserWarning, match="same model"):
        control.check_fits(dataclasses.replace(MODEL, fingerprint="b" * 64))


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ([("direction.1", ones(32))], our_keys(alignez__format_version=(2, U32)), "format_version is 2"),
        ([("direction.1", ones(32))], our_keys(alignez__format_version=("1", STRING)), "format_version"),
        ([("direction.1", ones(32))], our_keys(alignez__format_version=None), "format_version is missing"),
        ([("direction.1", ones(32))], our_keys(alignez__model__arch=None), "model.arch"),
        ([("direction.1", ones(32))], our_keys(alignez__model__n_embd=(64, U32)), "layer 1 has width 32"),
        ([("direction.1", ones(32))], our_keys(alignez__model__n_layer=(0, U32)), "n_layer"),
        ([("direction.1", ones(32))], our_keys(alignez__model__n_layer=(2**31, U32)), "n_layer"),
        ([("direction.6", ones(32))], our_keys(), "layer 6"),
        ([("direction.01", ones(32))], our_keys(), "direction.01"),
        ([("direction.-1", ones(32))], our_keys(), "direction.-1"),
        ([("direction.9999999999999999999", ones(32))], our_keys(), "unknown tensor"),
        ([("biases.1", ones(32))], our_keys(), "biases.1"),
        ([("direction.1", ones(2, 32))], our_keys(), "direction.1 has the shape"),
        ([("direction.1", np.ones(32, np.float16))], our_keys(), "direction.1 is not F32"),
        ([("direction.1", ones(32) * np.nan)], our_keys(), "direction.1 .*NaN"),
        ([("projection.1", np.full(32, np.inf, np.float32))], our_keys(), "projection.1 .*infinite"),
        ([("projection.1", 2 * UNIT[0])], our_keys(), "projection.1 is not orthonormal"),
        ([("projection.1", UNIT[[0, 0]])], our_keys(), "projection.1 is not orthonormal"),
        ([("projection.1", np.vstack([UNIT, UNIT]))], our_keys(), "projection.1 is not orthonormal"),
        ([("projection.1", UNIT[0]), ("direction.1", ones(16))], our_keys(), "layer 1"),
        ([("direction.1", np.zeros(32, np.float32))], our_keys(), "no layer is edited"),
        ([], our_keys(), "no layer is edited"),
        ([], [], "no layer is edited"),
        ([("projection.1", UNIT[0])], [], "format_version"),
        ([("direction.1", ones(32)), ("direction.2", ones(16))], [], "width"),
        ([("direction.1", ones(32))], [("glp.mode", "project", STRING)], "GLP"),
        (
            [("direction.1", ones(32))],
            our_keys(alignez__layer__loss=([0.5] * 5, ARRAY, FLOAT32)),
            "layer.accuracy is missing",
        ),
        (
            [("direction.1", ones(32))],
            our_keys(
                alignez__layer__accuracy=([0.5] * 5, ARRAY, FLOAT32),
                alignez__layer__p_helpful=([0.5] * 6, ARRAY, FLOAT32),
                alignez__layer__p_harmful=([0.5] * 6, ARRAY, FLOAT32),
            ),
            "layer.accuracy must hold one finite number for each of 6",
        ),
        (
            [("direction.1", ones(32))],
            our_keys(alignez__layer__accuracy=("high", STRING)),
            "layer.accuracy is not an array",
        ),
        ([("direction.1", ones(32))], our_keys(alignez__score__kl=(math.inf, FLOAT32)), "score.kl is inf"),
    ],
)
def test_malformed_files_are_refused_with_the_field_named(tmp_path, tensors, keys, message):
    path = write_gguf(tmp_path / "bad.gguf", tensors, keys)
    with pytest.raises(ControlFileError, match=message) as refusal:
        ControlFile.load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_truncation_of_a_file_is_refused(control, tmp_path):
    control.save(tmp_path / "c.gguf")
    whole = (tmp_path / "c.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    last_value = len(whole) - 32 * 4  # the padding after the last tensor may go
    for length in [*range(200), *range(200, last_value, 97)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ControlFileError, match=r"cut\.gguf"):
            ControlFile.load(cut)


def test_damaged_headers_end_in_a_control_file_error_or_load(control, tmp_path):
    control.save(tmp_path / "c.gguf")
    whole = (tmp_path / "c.gguf").read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for position in rng.integers(4, 1500, size=3):
            data[position] = rng.integers(256)
        damaged.write_bytes(data)
        try:
            ControlFile.load(damaged)
        except ControlFileError:
            refused += 1
    assert refused > 100


def test_counts_beyond_the_file_are_refused_at_once(tmp_path):
    for counts in [(2**63, 0), (0, 2**63), (1, 2**40)]:
        path = tmp_path / "huge.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(64))
        with pytest.raises(ControlFileError, match=r"huge\.gguf"):
            ControlFile.load(path)


def test_model_file_and_missing_file_and_folder_are_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", [("token_embd.weight", ones(4, 32))], arch="llama")
    with pytest.raises(ControlFileError, match=r"'llama'.*model"):
        ControlFile.load(path)
    with pytest.raises(ControlFileError, match="No such file"):
        ControlFile.load(tmp_path / "none.gguf")
    with pytest.raises(ControlFileError, match="cannot read"):
        ControlFile.load(tmp_path)


def test_output_that_cannot_be_written_leaves_nothing_behind(control, tmp_path):
    with pytest.raises(ControlFileError, match="cannot write"):
        control.save(tmp_path / "no such folder" / "c.gguf")
    (tmp_path / "taken.gguf").mkdir()
    with pytest.raises(ControlFileError, match="not a plain file"):
        control.save(tmp_path / "taken.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


def test_failed_save_keeps_the_old_file(control, tmp_path, monkeypatch):
    path = tmp_path / "c.gguf"
    control.save(path)
    before = path.read_bytes()

    def disk_full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", disk_full)
    with pytest.raises(ControlFileError, match="No space left"):
        control.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edits": {}}, "no layer is edited"),
        ({"edits": {0: LayerEdit()}}, "no layer is edited"),
        ({"edits": {6: LayerEdit(add=ones(32))}}, "layer 6"),
        ({"edits": {-1: LayerEdit(add=ones(32))}}, "layer -1"),
        ({"edits": {0: LayerEdit(add=ones(31))}}, "width 31"),
        ({"recipe": {"Method": "ccs"}}, "lower-case"),
        ({"recipe": {"method": None}}, "NoneType"),
        ({"recipe": {"layers": []}}, "recipe.layers"),
        ({"recipe": {"layers": [1, 2.5]}}, "one type"),
        ({"score": {"kl": math.nan}}, "score.kl is nan"),
        ({"score": {"n": 2**63}}, "64 bits"),
        ({"layers": LayerReport(ones(6), ones(6), ones(5))}, "p_harmful"),
        ({"layers": LayerReport(ones(6), ones(6), ones(6), spread=ones(5))}, "layer.spread"),
    ],
)
def test_content_that_cannot_be_stored_is_refused_on_construction(arguments, message):
    with pytest.raises(ControlFileError, match=message):
        ControlFile(**{"model": MODEL, "edits": {1: LayerEdit(add=ones(32))}, **arguments})


@pytest.mark.parametrize("figures", [{}, {"loss": ones(6) / 2}, {"loss": ones(6) / 2, "spread": ones(6) / 4}])
def test_report_holds_the_figures_that_the_method_has(figures, tmp_path):
    vectors = np.stack([UNIT[:1]] * 6)
    found = Directions("ccs", vectors, ones(6) / 8, 1 - ones(6) / 8, ones(6), **figures)
    control = ControlFile(MODEL, {1: LayerEdit(add=ones(32))}, layers=LayerReport.of(found))
    control.save(tmp_path / "c.gguf")
    report = ControlFile.load(tmp_path / "c.gguf").layers
    for name in ("accuracy", "p_helpful", "p_harmful"):
        np.testing.assert_array_equal(getattr(report, name), getattr(found, name))
    for name in ("loss", "spread"):
        np.testing.assert_array_equal(getattr(report, name), figures.get(name))


def test_file_with_a_scope_that_is_none_is_refused_when_it_is_asked_for() -> None:
    edits = {0: LayerEdit(remove=np.eye(8)[0])}
    control = ControlFile(ModelInfo("llama", 8, 2), edits, recipe={"scope": "sometimes"})
    with pytest.raises(SteeringError, match="sometimes"):
        _ = control.scope


GATE = Gate(np.array([5, 2], np.int32), np.array([0.5, -1.25], np.float32), 0.75)


def test_gate_comes_back_as_it_was_saved(control, tmp_path):
    gated = dataclasses.replace(control, gate=GATE)
    gated.save(tmp_path / "gated.gguf")
    loaded = ControlFile.load(tmp_path / "gated.gguf")

    assert loaded.gate is not None
    assert loaded.gate.digest == GATE.digest
    assert loaded.sha256 == gated.sha256 != control.sha256
    control.save(tmp_path / "c.gguf")
    assert ControlFile.load(tmp_path / "c.gguf").gate is None


def test_gate_is_a_tensor_that_other_readers_refuse(control, tmp_path):
    """llama.cpp's loader and older readers take no tensor of an unknown name; metadata they would skip."""
    dataclasses.replace(control, gate=GATE).save(tmp_path / "gated.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "gated.gguf").tensors]
    assert "gate" in names


GATE_KEYS = {
    "alignez__gate__tokens": ([5, 2], ARRAY, gguf.GGUFValueType.INT64),
    "alignez__gate__threshold": (0.75, gguf.GGUFValueType.FLOAT64),
}


@pytest.mark.parametrize(
    ("changes", "weights", "reason"),
    [
        ({"alignez__gate__tokens": None}, ones(2), "alignez.gate.tokens is not an array"),
        (
            {"alignez__gate__tokens": ([5.0, 2.0], ARRAY, FLOAT32)},
            ones(2),
            "alignez.gate.tokens is not an array",
        ),
        (
            {"alignez__gate__tokens": ([5, -2], ARRAY, gguf.GGUFValueType.INT64)},
            ones(2),
            "alignez.gate.tokens",
        ),
        ({"alignez__gate__threshold": None}, ones(2), "alignez.gate.threshold is None"),
        ({"alignez__gate__threshold": (math.nan, gguf.GGUFValueType.FLOAT64)}, ones(2), "finite"),
        ({}, ones(3), "as many weights as tokens"),
        ({}, ones(2, 2), "gate has the shape"),
        ({}, np.array([1, np.nan], np.float32), "gate has values that are NaN"),
    ],
)
def test_malformed_gate_is_refused(tmp_path, changes, weights, reason):
    keys = our_keys(**{**GATE_KEYS, **changes})
    path = write_gguf(tmp_path / "c.gguf", [("direction.1", ones(32)), ("gate", weights)], keys)
    with pytest.raises(ControlFileError, match=reason):
        ControlFile.load(path)


def test_gate_of_another_tool_is_refused(tmp_path):
    path = write_gguf(tmp_path / "c.gguf", [("direction.1", ones(32)), ("gate", ones(2))])
    with pytest.raises(ControlFileError, match="a gate but no alignez"):
        ControlFile.load(path)


def test_gate_that_lost_its_tensor_is_no_ungated_file(tmp_path):
    path = write_gguf(tmp_path / "c.gguf", [("direction.1", ones(32))], our_keys(**GATE_KEYS))
    with pytest.raises(ControlFileError, match="no tensor of that name"):
        ControlFile.load(path)


def test_threshold_may_be_any_number(control, tmp_path):
    for threshold in (1, np.float64(0.5)):
        dataclasses.replace(control, gate=dataclasses.replace(GATE, threshold=threshold)).save(
            tmp_path / "c.gguf"
        )
        assert ControlFile.load(tmp_path / "c.gguf").gate.threshold == threshold


def test_boosts_and_biases_come_back_as_they_were_saved(control, tmp_path):
    rows = orthonormal_rows(np.random.default_rng(0).standard_normal((2, 32)))
    edits = {
        0: LayerEdit(remove=rows, gain=[-1, 0.5], bias=np.ones(32), add=np.full(32, 2.0)),
        1: LayerEdit(remove=rows[:1], gain=[4.0]),
        3: LayerEdit(bias=np.ones(32)),
    }
    boosting = dataclasses.replace(control, edits=edits)
    boosting.save(tmp_path / "c.gguf")
    loaded = ControlFile.load(tmp_path / "c.gguf")
    assert loaded.sha256 == boosting.sha256 != control.sha256
    assert edits_sha256(loaded.edits) == edits_sha256(edits)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "c.gguf").tensors}
    assert {"projection.0.gain", "bias.0", "projection.1.gain", "bias.3"} <= names
    assert "projection.3.gain" not in names


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([("bias.1", ones(31))], "has width 31"),
        ([("bias.1", ones(2, 16))], "bias.1 has the shape"),
        ([("bias.1.gain", ones(1))], "unknown tensor"),
        ([("direction.1.gain", ones(1))], "unknown tensor"),
        ([("projection.1.gain", ones(1))], "one number for each row"),
        (
            [("projection.1", np.eye(32, dtype=np.float32)[0]), ("projection.1.gain", ones(2))],
            "one number for each row",
        ),
        (
            [
                ("projection.1", np.eye(32, dtype=np.float32)[0]),
                ("projection.1.gain", np.array([np.nan], np.float32)),
            ],
            "NaN",
        ),
    ],
)
def test_malformed_boost_or_bias_is_refused(tmp_path, tensors, reason):
    path = write_gguf(tmp_path / "c.gguf", tensors, our_keys())
    with pytest.raises(ControlFileError, match=reason):
        ControlFile.load(path)


def test_bias_of_another_tool_is_refused(tmp_path):
    path = write_gguf(tmp_path / "c.gguf", [("bias.1", ones(32))])
    with pytest.raises(ControlFileError, match=r"no alignez\.format_version"):
        ControlFile.load(path)
