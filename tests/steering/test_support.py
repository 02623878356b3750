"""Which way `steer` takes for a model."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from alignez_gguf.errors import ModelFileError
from alignez_gguf.runtime import bindings
from alignez_gguf.steering.patched import steering_support
from tests.models import OUT_OF_REACH, tiny_model


@pytest.mark.parametrize(("architecture", "way"), [("mixtral", "patched"), (OUT_OF_REACH, "stock")])
def test_the_patch_is_taken_where_it_reaches_every_layer(architecture: str, way: str) -> None:
    found = steering_support(tiny_model(architecture).gguf)

    assert found.steers == way
    assert ("out of reach" in found.reason) == (way == "stock")


def test_adapters_are_taken_where_the_patch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "is_patched", lambda: False)

    assert steering_support(tiny_model("llama").gguf).steers == "stock"


def test_a_model_without_down_projections_cannot_be_steered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = steering_support(path)

    assert found.steers == "no"
    assert "no ffn_down weight" in found.reason


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ModelFileError, match=r"missing\.gguf"):
        steering_support(Path("missing.gguf"))
