from __future__ import annotations

import tracemalloc

import gguf
import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ModelInfo
from alignez_gguf.errors import ModelFileError
from alignez_gguf.exporters.weights import ModelWeights
from alignez_gguf.runtime.model import Model
from tests.models import ARCHITECTURES, tiny_model
from tests.silent_models import copy_fields, finish


def write_model(path, *, arch="llama", seed=0, n_layer=4, vocabulary=100, **keys):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Tiny")
    writer.add_block_count(n_layer)
    writer.add_embedding_length(64)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_token_list([f"token {i}" for i in range(vocabulary)])
    for key, value in keys.items():
        writer.add_uint32(key.replace("__", "."), value)
    weights = np.random.default_rng(seed).normal(size=(100, 64)).astype(np.float32)
    writer.add_tensor("token_embd.weight", weights)
    quantized = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_down.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    return path


class Loaded:
    def __init__(self, model_path, metadata):
        self.model_path = str(model_path)
        self.metadata = metadata


def test_header_describes_the_model(tmp_path):
    info = ModelInfo.from_gguf(write_model(tmp_path / "m.gguf"))
    assert (info.arch, info.n_embd, info.n_layer, info.name) == ("llama", 64, 4, "Tiny")
    assert info.quantization == "Q4_K_M"
    assert len(info.fingerprint) == 64


def test_draft_layers_do_not_count(tmp_path):
    path = write_model(tmp_path / "m.gguf", n_layer=5, llama__nextn_predict_layers=1)
    assert ModelInfo.from_gguf(path).n_layer == 4


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = ModelInfo.from_gguf(write_model(tmp_path / "a.gguf"))
    copy = ModelInfo.from_gguf(write_model(tmp_path / "b.gguf"))
    other_weights = ModelInfo.from_gguf(write_model(tmp_path / "c.gguf", seed=1))
    other_header = ModelInfo.from_gguf(write_model(tmp_path / "d.gguf", vocabulary=101))
    assert first == copy
    assert len({first.fingerprint, other_weights.fingerprint, other_header.fingerprint}) == 3


def test_large_vocabulary_is_stepped_over(tmp_path):
    assert ModelInfo.from_gguf(write_model(tmp_path / "m.gguf", vocabulary=20_000)).n_embd == 64


def test_loaded_model_is_described_from_its_file_or_else_its_metadata(tmp_path):
    path = write_model(tmp_path / "m.gguf")
    metadata = {
        "general.architecture": "llama",
        "general.file_type": "15",
        "llama.block_count": "4",
        "llama.embedding_length": "64",
    }
    assert ModelInfo.from_llama(Loaded(path, metadata)) == ModelInfo.from_gguf(path)
    gone = ModelInfo.from_llama(Loaded(tmp_path / "gone.gguf", metadata))
    assert gone == ModelInfo("llama", 64, 4, quantization="Q4_K_M")


def write_part(path, index, count, **keys):
    """A part of a split model as llama-gguf-split writes it: only the first names anything."""
    writer = gguf.GGUFWriter(path, "llama")
    del writer.kv_data[0]["general.architecture"]
    for key, value in {"split.no": index, "split.count": count, **keys}.items():
        writer.add_uint16(key, value)
    writer.add_tensor(f"blk.{index}.attn_norm.weight", np.ones(64, np.float32))
    finish(writer)
    return path


def test_first_part_of_a_split_model_is_enough_to_describe_it(tmp_path):
    assert ModelInfo.from_gguf(write_model(tmp_path / "1.gguf", split__no=0, split__count=2)).n_layer == 4


def test_later_part_of_a_split_model_is_refused_with_the_name_of_the_first(tmp_path):
    with pytest.raises(ModelFileError, match=r"part 2 of 3 of .*its first part, m-00001-of-00003\.gguf$"):
        ModelInfo.from_gguf(write_part(tmp_path / "m-00002-of-00003.gguf", 1, 3))
    with pytest.raises(ModelFileError, match=r"the one named NAME-00001-of-00003\.gguf$"):
        ModelInfo.from_gguf(write_part(tmp_path / "renamed.gguf", 2, 3))


OPENERS = {"Model": lambda path: Model(path, n_gpu_layers=0), "ModelWeights": ModelWeights}


@pytest.mark.parametrize("opener", OPENERS)
def test_missing_part_is_named_with_the_mend(tmp_path, opener):
    first = write_model(tmp_path / "m-00001-of-00003.gguf", split__no=0, split__count=3)
    write_part(tmp_path / "m-00002-of-00003.gguf", 1, 3)
    with pytest.raises(ModelFileError, match=r"part 3 is missing; put m-00003-of-00003\.gguf beside it$"):
        OPENERS[opener](first)


@pytest.mark.parametrize("opener", OPENERS)
def test_damaged_misplaced_and_misnamed_parts_are_refused(tmp_path, opener):
    first = write_model(tmp_path / "m-00001-of-00002.gguf", split__no=0, split__count=2)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is not part 2 of"):
        OPENERS[opener](first)
    second.write_bytes(write_part(tmp_path / "part.gguf", 1, 2).read_bytes()[:-80])
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is not a usable GGUF model: it ends"):
        OPENERS[opener](first)
    with pytest.raises(
        ModelFileError, match=r"not named NAME-00001-of-00002\.gguf; give the parts their names"
    ):
        OPENERS[opener](first.rename(tmp_path / "m.gguf"))


def test_split_model_is_loaded_from_its_first_part(tmp_path):
    """The parts are those that llama.cpp's own splitter writes, here by hand of the demo model."""
    reader = gguf.GGUFReader(demo.MODEL)
    first, second = (tmp_path / f"m-{part:05}-of-00002.gguf" for part in (1, 2))
    half = len(reader.tensors) // 2
    for index, path in enumerate((first, second)):
        writer = gguf.GGUFWriter(path, "llama")
        if index == 0:
            copy_fields(reader, writer)
        else:
            del writer.kv_data[0]["general.architecture"]
        for key, value in {"no": index, "count": 2}.items():
            writer.add_uint16(f"split.{key}", value)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[half:] if index else reader.tensors[:half]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
    with Model(demo.MODEL, n_gpu_layers=0) as whole, Model(first, n_gpu_layers=0) as model:
        assert model.n_bytes == whole.n_bytes
    assert set(ModelWeights(first).tensors) == {tensor.name for tensor in reader.tensors}
    with pytest.raises(ModelFileError, match=r"its first part, m-00001-of-00002\.gguf"):
        Model(second)


def test_alignment_beyond_the_file_takes_no_memory(tmp_path):
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("general.alignment", 1 << 31)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tracemalloc.start()
    try:
        assert ModelInfo.from_gguf(path).n_embd == 32
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_missing_file_and_folder_and_other_files_are_refused(tmp_path):
    text = tmp_path / "model.txt"
    text.write_text("not a model")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    for path, message in [
        (tmp_path / "none.gguf", "No such file"),
        (tmp_path, "cannot read"),
        (text, "letters GGUF"),
        (empty, "letters GGUF"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            ModelInfo.from_gguf(path)


@pytest.mark.parametrize("kept", [6, 30, 500, 5000, 30_000, -40])
def test_truncated_model_is_refused(tmp_path, kept):
    path = write_model(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match="it ends"):
        ModelInfo.from_gguf(path)


def test_gguf_file_that_is_no_language_model_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    finish(writer)
    with pytest.raises(ModelFileError, match=r"clip\.block_count"):
        ModelInfo.from_gguf(path)


def test_big_endian_model_is_refused_by_name(tmp_path):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    finish(writer)
    with pytest.raises(ModelFileError, match="big-endian"):
        ModelInfo.from_gguf(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_norm_behind_the_mlp_is_known_of_the_architecture(architecture):
    path = tiny_model(architecture).gguf
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}

    assert ModelInfo.from_gguf(path).has_post_norm == ("blk.0.post_ffw_norm.weight" in names)
