from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "experiments"))

from known_models import known_models

PAPER = (
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
    ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
)


def test_models_of_the_paper_come_first_each_with_its_aligned_version():
    found = [(model.base, model.aligned) for model in known_models()]
    expected = [line for base, aligned in PAPER for line in ((base, aligned), (None, aligned))]
    assert found[: len(expected)] == expected
    assert all((model.layers, model.width) == (32, 4096) for model in known_models()[: len(expected)])


def test_every_line_names_a_file_of_a_repository_and_the_shape_of_a_model():
    models = known_models()
    assert len({model.name for model in models}) == len(models)
    for model in models:
        assert re.fullmatch(r"[a-z0-9.-]+", model.name)
        for hub_id in (model.base or model.aligned, model.aligned, model.gguf_repository):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id)
        assert re.fullmatch(r"[\w.-]+\.gguf", model.gguf_file)
        assert 16 <= model.layers <= 64
        assert model.width % 64 == 0


def test_architectures_are_those_that_gguf_has_names_for():
    from gguf.constants import MODEL_ARCH_NAMES

    assert {model.architecture for model in known_models()} <= set(MODEL_ARCH_NAMES.values())


def test_every_aligned_version_has_its_base_model():
    models = known_models()
    bases = {model.aligned for model in models if model.base is not None}
    assert {model.aligned for model in models if model.base is None} <= bases
