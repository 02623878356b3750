"""A mistyped name is told at once, whether or not the hub can be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from alignez_gguf.engines.transformers.engine import TransformersEngine
from alignez_gguf.engines.transformers.hub import require_findable
from alignez_gguf.errors import ModelFileError


def http_error(kind: Any, status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "http://hub"))
    error: Exception = kind("refused", response=response)
    return error


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hub answers with the first item, if there is one; the names that it is asked for come behind it."""
    answers: list[Any] = []

    def model_info(_: HfApi, name: str, timeout: float) -> None:
        assert timeout <= 10
        answers.append(name)
        if isinstance(answers[0], Exception):
            raise answers[0]

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return answers


@pytest.mark.parametrize("name", ["modle-Q4_K_M", "org/modle"])
def test_name_that_the_hub_cannot_be_asked_for_is_told_after_one_try(asked: list[Any], name: str) -> None:
    asked.append(httpx.ConnectError("Name or service not known"))
    message = rf"there is no file or folder {name}, and the hub cannot be asked .*not known; give a GGUF file"
    with pytest.raises(ModelFileError, match=message):
        TransformersEngine(name)
    assert asked[1:] == [name]


def test_name_that_the_hub_does_not_know_is_told(asked: list[Any]) -> None:
    asked.append(http_error(RepositoryNotFoundError, 404))
    with pytest.raises(ModelFileError, match="no file or folder org/modle, and no model of that name on the"):
        require_findable("org/modle")
    with pytest.raises(ModelFileError, match="no file or folder my model, and no model of that name on the"):
        require_findable("my model")  # no hub id at all
    assert asked[1:] == ["org/modle"]


@pytest.mark.parametrize("answer", [None, http_error(GatedRepoError, 403)])
def test_model_of_the_hub_passes(asked: list[Any], answer: Any) -> None:
    asked.append(answer)
    require_findable("org/model")
    assert asked[1:] == ["org/model"]


def test_directory_and_cached_model_need_no_hub(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_findable(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    require_findable("org/model")
    assert asked == []
