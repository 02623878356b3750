from __future__ import annotations

from typing import Any

import pytest

from alignez_gguf.engines import json_api
from alignez_gguf.errors import EndpointError
from alignez_gguf.evaluation.judges.client import ChatEndpoint, ChatRequest
from tests.evaluation.servers import Reply, chat_server, said


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_api, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("ALIGNEZ_API_KEY", raising=False)


def echo(body: dict[str, Any]) -> Reply:
    return said(body["messages"][0]["content"].upper())


def asked(endpoint: ChatEndpoint, *messages: str) -> list[str]:
    found = dict(endpoint.replies([ChatRequest(message, 0.5, seed) for seed, message in enumerate(messages)]))
    return [found[index] for index in range(len(messages))]


def test_every_reply_belongs_to_its_request() -> None:
    with chat_server(echo) as server:
        messages = [f"message {n} ä" for n in range(30)]
        assert asked(ChatEndpoint(server.url), *messages) == [message.upper() for message in messages]
        by_seed = sorted(server.requests, key=lambda body: int(body["seed"]))
    assert [body["messages"][0]["content"] for body in by_seed] == messages
    assert {(body["model"], body["temperature"]) for body in by_seed} == {("judge", 0.5)}


def test_key_is_sent_and_never_shown() -> None:
    def refuse(body: dict[str, Any]) -> Reply:
        return 401, {"error": {"message": f"{body['authorization']} is wrong"}}

    with chat_server(refuse) as server, pytest.raises(EndpointError) as caught:
        asked(ChatEndpoint(server.url, api_key="secret-7"), "x")
    assert server.requests[0]["authorization"] == "Bearer secret-7"
    assert "secret-7" not in str(caught.value)
    assert "401" in str(caught.value)
    assert "ALIGNEZ_API_KEY" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "trouble",
    [(429, {"error": "slow down"}), (200, b"<html>"), (200, {"choices": []}), (503, b""), (200, None)],
)
def test_trouble_that_passes_is_waited_out(trouble: Reply) -> None:
    n_asked = 0

    def answer(body: dict[str, Any]) -> Reply:
        nonlocal n_asked
        n_asked += 1
        return trouble if n_asked < 3 else echo(body)

    with chat_server(answer) as server:
        assert asked(ChatEndpoint(server.url), "x") == ["X"]


@pytest.mark.parametrize(
    ("trouble", "words"), [((429, {"error": "slow down"}), "429"), ((200, b"{broken"), "tried 2 times")]
)
def test_trouble_that_stays_is_told_in_one_line(trouble: Reply, words: str) -> None:
    with chat_server(lambda body: trouble) as server, pytest.raises(EndpointError) as caught:
        asked(ChatEndpoint(server.url, retries=1), "x")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_models_have_to_be_told_apart() -> None:
    with chat_server(echo, models=("one", "two")) as server:
        with pytest.raises(EndpointError, match=r"one, two.*--judge-model"):
            ChatEndpoint(server.url)
        assert asked(ChatEndpoint(server.url, model="two"), "x") == ["X"]


def test_reply_without_content_is_empty() -> None:
    with chat_server(lambda body: (200, {"choices": [{"message": {"content": None}}]})) as server:
        assert asked(ChatEndpoint(server.url), "x") == [""]
