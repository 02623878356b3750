"""Requests that are made to harm: none gets further than an answer that says what is wrong with it."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from alignez_gguf import demo
from tests.server.client import Server
from tests.server.conftest import Serve
from tests.server.test_process import started

ASK = {"model": "demo", "prompt": "Human: hi", "max_tokens": 4}
JSON = {"Content-Type": "application/json"}
KEY, WRONG_KEY = "sk-the-right-one-1234", "sk-a-wrong-one-5678"


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Iterator[Server]:
    with serve(api_keys=(KEY,), body_bytes=10_000) as server:
        yield server


def raw(server: Server, target: str, method: str = "GET") -> bytes:
    """The answer to a path as it stands, which clients would tidy up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("prefix", ["", "/v1/models", "/page.css"])
@pytest.mark.parametrize(
    "path",
    [
        "/../app.py",
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/app.py",
        "/..%2f..%2fapp.py",
        "/..%5c..%5capp.py",
        "//etc/passwd",
        "/%00/etc/passwd",
        "/./page/../app.py",
    ],
)
def test_path_leads_to_no_file(server: Server, prefix: str, path: str) -> None:
    status, _, rest = raw(server, prefix + path).partition(b"\r\n")
    assert status.split()[1] in (b"400", b"404")
    assert b"root:" not in rest
    assert b"create_app" not in rest


def test_control_is_a_name_and_never_a_path(server: Server, control_path: Path) -> None:
    before = httpx.get(f"{server.url}/v1/steering").json()
    names = [str(control_path), "../safe", "./safe", "safe.gguf", "safe\0", "SAFE", "", "safe/../safe", "~"]
    for name in names:
        for response in (
            httpx.put(f"{server.url}/v1/steering", json={"control": name}),
            httpx.post(f"{server.url}/v1/completions", json={**ASK, "steering": {"control": name}}),
        ):
            assert response.status_code == 400, name
            assert "it has safe, other" in response.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/steering").json() == before


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model":' * 20_000,
        b'{"model": "demo", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "demo", "prompt": "x", "temperature": NaN}',
        b'{"model": "demo", "prompt": "x", "top_p": Infinity}',
        b'{"model": "demo", "prompt": "x", "temperature": 1e999}',
        b'{"model": "demo", "prompt": "x", "max_tokens": "4"}',
        b'{"model": "demo", "prompt": "x", "max_tokens": true}',
        b'{"model": "demo", "prompt": "x", "presence_penalty": false}',
        b'{"model": "demo", "prompt": "x", "steering": {"control": "\\ud800"}}',
        b'{"model": "demo", "prompt": "x", "steering": {"scope": "first:' + b"9" * 5000 + b'"}}',
        b'{"model": "demo", "prompt": "x", "stop": [' + b",".join([b'"x"'] * 1000) + b"]}",
        b'{"model": "demo", "prompt": "' + b"x" * 500_000 + b'"}',
        b'{"model": "demo", "prompt": "x", "n": 128, "max_tokens": 1' + b"0" * 30 + b"}",
        b"\xff\xfe{}",
        b"",
        b"null",
        b'"model"',
    ],
)
def test_body_that_cannot_be_meant_is_refused_in_one_line(server: Server, body: bytes) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON, timeout=30)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "\n" not in message
    assert len(message) < 6000
    assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 200


def test_long_run_of_digits_does_not_exhaust_the_stack(tmp_path: Path) -> None:
    """Of a vocabulary that is split with std::regex, in a process of its own: it would end with SIGSEGV."""
    model = tmp_path / "demo.gguf"
    rename = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--pre-tokenizer", "deepseek-coder"]
    subprocess.run([*rename, str(demo.MODEL), str(model)], check=True, capture_output=True)
    with started("--context", "4096", model=str(model)) as (process, url):
        for character in "1a!":
            body = {**ASK, "prompt": character * 60_000}
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert response.json()["error"]["code"] == "context_length_exceeded"
        assert process.poll() is None


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e300])
def test_number_beyond_single_precision_is_survived(server: Server, temperature: float) -> None:
    body = {**ASK, "temperature": temperature, "top_p": 1e-300, "seed": -(2**63)}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 4


def test_half_characters_of_a_prompt_are_survived(server: Server) -> None:
    body = b'{"model": "demo", "prompt": "\\ud83d x \\ude00", "max_tokens": 4, "stop": "\\ud800"}'
    assert httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON).status_code in (200, 400)


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_page_of_another_site_can_ask_for_nothing(server: Server, kind: str | None) -> None:
    headers = {"Origin": "https://evil.example", **({"Content-Type": kind} if kind else {})}
    for method, path, body in (("POST", "/v1/completions", ASK), ("PUT", "/v1/steering", {"strength": 0})):
        response = httpx.request(method, server.url + path, content=json.dumps(body), headers=headers)
        assert response.status_code == 415
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_page_of_another_site_can_read_nothing(server: Server) -> None:
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        for path in ("/v1/steering", "/v1/models", "/metrics", "/"):
            response = httpx.request(method, server.url + path, headers=preflight)
            assert response.status_code == (405 if method == "OPTIONS" else 200)
            assert not [name for name in response.headers if name.startswith("access-control-")]
    assert httpx.options(f"{server.url}/v1/steering").headers["allow"] == "GET, HEAD, PUT"


def test_keys_are_in_no_answer_no_metric_and_no_log(
    guarded: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise OSError("an error that nobody expected")

    caplog.set_level(logging.DEBUG)
    said = []
    with httpx.Client(base_url=guarded.url) as client:
        for key in (KEY, WRONG_KEY):
            headers = {"Authorization": f"Bearer {key}"}
            asked: tuple[tuple[str, str, dict[str, object]], ...] = (
                ("GET", "/metrics", {}),
                ("GET", "/openapi.json", {}),
                ("GET", "/v1/nothing", {}),
                ("DELETE", "/v1/models", {}),
                ("POST", "/v1/completions", {"json": ASK}),
                ("POST", "/v1/completions", {"json": {**ASK, "model": "other"}}),
                ("POST", "/v1/completions", {"content": b"{", "headers": headers | JSON}),
                ("POST", "/v1/completions", {"content": b"x" * 20_000}),
                ("POST", "/v1/completions", {"content": b"x" * 20, "headers": {"X-Api-Key": key}}),
                ("PUT", "/v1/steering", {"json": {"control": "missing"}}),
            )
            said += [client.request(*one[:2], **{"headers": headers, **one[2]}) for one in asked]  # type: ignore[arg-type]
        monkeypatch.setattr(guarded.service, "steering", fail)
        said.append(client.post("/v1/completions", json=ASK, headers={"Authorization": f"Bearer {KEY}"}))
    malformed = f"GET / HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nno colon\r\n\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=20) as connection:
        connection.sendall(malformed.encode())
        answer = connection.recv(65536)

    assert {200, 400, 401, 404, 405, 413, 500} <= {response.status_code for response in said}
    assert answer.startswith(b"HTTP/1.1 400 ")
    shown = [f"{one.headers} {one.text}" for one in said] + [
        answer.decode(),
        caplog.text,
        *capfd.readouterr(),
    ]
    assert "nobody expected" in caplog.text
    assert not [text for text in shown if KEY in text or WRONG_KEY in text]


def test_process_says_nothing_about_its_keys(control_path: Path) -> None:
    with started("-c", str(control_path), ALIGNEZ_API_KEY=KEY) as (process, url):
        for key in (KEY, WRONG_KEY):
            headers = {"Authorization": f"Bearer {key}"}
            httpx.post(f"{url}/v1/completions", json=ASK, headers=headers)
            httpx.post(f"{url}/v1/completions", content=b"{", headers=headers | JSON)
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert KEY not in said
    assert WRONG_KEY not in said
