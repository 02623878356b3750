"""HEAD, and paths that end in a slash."""

from __future__ import annotations

import socket

import httpx2 as httpx
import pytest

from tests.server.client import Server
from tests.server.conftest import Serve

READABLE = (
    "/",
    "/page.css",
    "/page.js",
    "/health",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/models/demo",
    "/v1/steering",
)
ASK = {"model": "demo", "prompt": "Human: hi", "max_tokens": 4}


def headers_of(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name != "date"}


@pytest.mark.parametrize("path", READABLE)
def test_head_is_answered_as_get_without_the_body(server: Server, path: str) -> None:
    got, head = (httpx.request(method, server.url + path) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    expected = headers_of(got)
    if path == "/metrics":  # it counts its own readers, and grows
        assert head.headers["content-length"].isdecimal()
        expected["content-length"] = head.headers["content-length"]
    assert headers_of(head) == expected
    assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/steering", 200), ("/v1/models/x", 404), ("/v1/completions", 405)]
)
def test_nothing_follows_the_headers_of_a_head(server: Server, path: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(f"{request}\r\n{request}Connection: close\r\n\r\n".encode())
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    first, second, rest = said.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 %d " % status)
    assert second.startswith(b"HTTP/1.1 %d " % status)
    assert rest == b""


def test_head_needs_the_key_that_get_needs(serve: Serve) -> None:
    with serve(api_keys=("secret",)) as server:
        for path in READABLE:
            got, head = (httpx.request(method, server.url + path) for method in ("GET", "HEAD"))
            assert (head.status_code, headers_of(head)) == (got.status_code, headers_of(got))


def test_methods_that_are_allowed_are_named(server: Server) -> None:
    for path, allowed in (
        ("/v1/models/", "GET, HEAD"),
        ("/v1/steering", "GET, HEAD, PUT"),
        ("/health", "GET, HEAD"),
    ):
        response = httpx.delete(server.url + path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
    for method in ("GET", "HEAD"):
        response = httpx.request(method, f"{server.url}/v1/completions")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [path for path in READABLE if path != "/metrics"])
def test_slash_at_the_end_makes_no_difference(server: Server, path: str, method: str) -> None:
    plain, slashed = (httpx.request(method, f"{server.url}{path}{end}") for end in ("", "/"))
    assert slashed.status_code == 200
    assert (headers_of(slashed), slashed.content) == (headers_of(plain), plain.content)


def test_slash_at_the_end_makes_no_difference_to_what_is_asked(server: Server) -> None:
    for path in ("/v1/completions", "/v1/completions/"):
        assert httpx.post(server.url + path, json=ASK).status_code == 200
    assert httpx.get(f"{server.url}/v1/nothing/").status_code == 404
    assert httpx.get(f"{server.url}/v1/models/other/").status_code == 404
    assert httpx.get(f"{server.url}/v1/models/").json()["data"][0]["id"] == "demo"


def test_slash_at_the_end_makes_no_difference_to_keys_and_counters(serve: Serve) -> None:
    with serve(api_keys=("secret",)) as server:
        assert httpx.get(f"{server.url}/health/").status_code == 200
        assert httpx.get(f"{server.url}/v1/models/").status_code == 401
        told = httpx.get(f"{server.url}/metrics/", headers={"Authorization": "Bearer secret"}).text
        assert 'alignez_requests_total{path="/v1/models",status="401"} 1.0' in told
