"""Who is turned away, how, and what becomes of the others."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx2 as httpx
import openai
import pytest

from alignez_gguf.engines.llama.batching import Failed, QueuedRequest, SequenceRequest
from tests.server.client import Server, until
from tests.server.conftest import Lone, Serve

ASK = {"model": "demo", "prompt": "Human: hi", "max_tokens": 4}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Iterator[Server]:
    with serve(api_keys=("first", "schlüssel")) as server:
        yield server


def error_of(response: httpx.Response) -> dict[str, str | None]:
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, str | None] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_wrong_key_is_refused_and_any_right_one_taken(guarded: Server) -> None:
    for key in ("second", "Bearer", "firs"):
        with guarded.client(key) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.completions.create(**ASK)  # type: ignore[call-overload]
        assert caught.value.code == "invalid_api_key"
    with guarded.client("first") as client:
        assert client.completions.create(**ASK).choices  # type: ignore[call-overload]
    bearer = {"Authorization": "Bearer schlüssel".encode()}
    assert httpx.get(f"{guarded.url}/v1/models", headers=bearer).status_code == 200  # type: ignore[arg-type]


def test_without_a_key_only_the_page_and_the_health_are_shown(guarded: Server) -> None:
    open_paths = ("/", "/page.css", "/page.js", "/health", "/health/")
    assert {httpx.get(guarded.url + path).status_code for path in open_paths} == {200}
    closed = ("/v1/models", "/v1/steering", "/metrics", "/nothing", "/health/x", "/docs", "/openapi.json")
    assert {httpx.get(guarded.url + path).status_code for path in closed} == {401}
    assert httpx.put(f"{guarded.url}/v1/steering", json={"strength": 0}).status_code == 401


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**CHAT, "model": "gpt-4"})  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert client.models.retrieve("demo").id == "demo"
    assert [model.id for model in client.models.list()] == ["demo"]


def test_prompt_that_does_not_fit_is_refused_with_openais_code(client: openai.OpenAI) -> None:
    for fields in ({"prompt": "word " * 300}, {"max_tokens": 250, "prompt": "word " * 20}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{**ASK, **fields})  # type: ignore[call-overload]
        assert caught.value.code == "context_length_exceeded"
        assert "256" in caught.value.message


def test_chat_without_a_limit_may_fill_the_context(client: openai.OpenAI) -> None:
    asked = {**CHAT, "max_tokens": None, "logit_bias": {}, "user": "somebody"}
    answer = client.chat.completions.create(**asked, extra_body={"steering": {"strength": 0}})  # type: ignore[call-overload]
    assert answer.usage.total_tokens <= 256


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"steering": {"strength": -1}}, "steering.strength"),
        ({"steering": {"scope": "last"}}, "steering"),
        ({"steering": {"control": "missing"}}, "steering"),
        ({"steering": {"strenght": 1}}, "steering.strenght"),
        ({"top_k": 4}, "top_k"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"echo": True}, "echo"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, fields: dict[str, object], param: str
) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={**ASK, **fields})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert next(iter(fields)).split(".")[0] in str(error["message"]) or param in ("prompt", "steering")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    ],
)
def test_messages_that_are_no_conversation_are_refused(server: Server, messages: list[object]) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "messages": messages})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_body_that_is_no_json_or_not_said_to_be_is_refused(server: Server) -> None:
    url = f"{server.url}/v1/completions"
    for content, kind in ((b"{", "application/json"), (b'{"model": "demo", "prompt": "x"}', "text/plain")):
        response = httpx.post(url, content=content, headers={"content-type": kind})
        assert response.status_code in (400, 415)
        error_of(response)


def test_paths_and_methods_that_are_not_there(server: Server) -> None:
    for response, status in (
        (httpx.get(f"{server.url}/v1/nothing"), 404),
        (httpx.get(f"{server.url}/v1/completions"), 405),
    ):
        assert response.status_code == status
        error_of(response)


def test_body_beyond_the_limit_is_refused_however_it_is_sent(serve: Serve) -> None:
    with serve(body_bytes=1000) as server:
        url = f"{server.url}/v1/completions"
        long = b'{"model": "demo", "prompt": "' + b"x" * 2000 + b'"}'
        chunks = (long[at : at + 100] for at in range(0, len(long), 100))
        for content in (long, chunks):
            response = httpx.post(url, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413
            error_of(response)
        assert httpx.post(url, json=ASK).status_code == 200


def test_tokens_beyond_the_servers_limits_are_refused(serve: Serve) -> None:
    with serve(max_tokens=8, max_prompt_tokens=10) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{**ASK, "max_tokens": 9})  # type: ignore[call-overload]
        assert caught.value.param == "max_tokens"
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{**ASK, "prompt": "word " * 11})  # type: ignore[call-overload]
        assert caught.value.code == "context_length_exceeded"
        answer = client.completions.create(model="demo", prompt="Human: hi", temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 8


def test_foreign_host_name_is_refused_where_no_key_is_wanted(server: Server, guarded: Server) -> None:
    for name, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        response = httpx.get(f"{server.url}/v1/models", headers={"Host": name})
        assert response.status_code == status
    headers = {"Host": "my.example", "Authorization": "Bearer first"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


LONG = {**ASK, "max_tokens": 240, "temperature": 1, "seed": 0, "prompt": "x"}


def busy(server: Server, *, n: int, api_key: str = "none", stream: bool = True) -> socket.socket:
    """Begin a request of many long answers, and wait until the first ones grow."""
    connection = server.begin("/v1/completions", {**LONG, "n": n, "stream": stream}, api_key)
    until(lambda: server.service.scheduler.n_running)
    return connection


def test_queue_that_is_full_answers_429_and_then_takes_requests_again(serve: Serve) -> None:
    with serve(n_parallel=2, queue=20) as server, server.client() as client:
        connection = busy(server, n=20)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**{**ASK, "n": 10})  # type: ignore[call-overload]
        assert caught.value.response.headers["retry-after"] == "1"
        connection.close()
        until(lambda: not server.service.scheduler.n_waiting)
        assert client.completions.create(**{**ASK, "n": 10}).choices  # type: ignore[call-overload]


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_stops_its_answers(serve: Serve, stream: bool) -> None:
    with serve(n_parallel=2) as server:
        scheduler = server.service.scheduler
        connection = busy(server, n=100, stream=stream)
        assert scheduler.n_waiting > 50
        connection.close()
        until(lambda: scheduler.n_waiting == 0 and scheduler.n_running == 0)
        until(lambda: server.metric("alignez_cancelled_requests_total") == 1)
        assert server.metric("alignez_generated_tokens_total") < 50 * 240


def test_client_with_many_requests_does_not_make_another_one_wait_for_all(serve: Serve) -> None:
    with serve(n_parallel=2, api_keys=("many", "few")) as server:
        scheduler = server.service.scheduler
        connection = busy(server, n=100, api_key="many")
        with server.client("few") as client:
            client.completions.create(**ASK)  # type: ignore[call-overload]
        assert scheduler.n_waiting > 50
        connection.close()


def test_neighbours_survive_a_failure_and_later_requests_are_answered(
    serve: Serve, lone: Lone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as server, server.client() as client:
        batch = server.service.scheduler._batch

        def fail() -> None:
            raise MemoryError("no more of it")

        monkeypatch.setattr(batch, "_decode", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**ASK)  # type: ignore[call-overload]
        assert "no more of it" in caught.value.message
        with pytest.raises(openai.APIError):
            list(client.completions.create(**ASK, stream=True))  # type: ignore[call-overload]
        monkeypatch.undo()
        answer = client.completions.create(**ASK, seed=1, extra_body={"steering": {"strength": 1}})  # type: ignore[call-overload]
        assert answer.choices[0].text == lone("Human: hi", 1, 1.0, max_tokens=4)


def test_scheduler_that_closes_tells_everybody(serve: Serve) -> None:
    with serve(n_parallel=2) as server:
        heard: list[object] = []
        tokens = tuple(server.service.model.tokenize("x"))
        from alignez_gguf.engines.base import Sampling

        queued = [QueuedRequest(SequenceRequest(tokens, Sampling(240)), heard.append) for _ in range(9)]
        server.service.scheduler.submit(queued, "me")
        server.service.scheduler.close()
        assert sum(isinstance(event, Failed) for event in heard) == 9
