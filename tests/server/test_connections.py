"""Clients that send slowly, do not read, or leave: they lose what they hold, and others are served."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import httpx2 as httpx
import pytest

from alignez_gguf.engines.base import Sampling
from alignez_gguf.engines.llama.batching import QueuedRequest, SequenceRequest, TextDelta
from alignez_gguf.server import service as service_module
from alignez_gguf.server.errors import ApiError
from alignez_gguf.server.limits import HEAD_BYTES, Connection
from alignez_gguf.server.service import ResponseStream
from tests.server.client import Server, until
from tests.server.conftest import Serve

ASK = {"model": "demo", "prompt": "Human: hi", "max_tokens": 4}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
UNFINISHED = {
    "nothing": b"",
    "head": HEAD,
    "body": HEAD + b"Content-Length: 500\r\n\r\n{",
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
}


class Impatient(Connection):
    """Gives up soon, and sends little ahead of what is read."""

    request_seconds = reading_seconds = 0.5

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)


class Crowded(Connection):
    most_waiting = 8


@pytest.fixture(scope="module")
def impatient(serve: Serve) -> Iterator[Server]:
    with serve(connection=Impatient) as server:
        yield server


@contextmanager
def connected(server: Server, *sent: bytes) -> Iterator[Sequence[socket.socket]]:
    """One connection for each text, over which it was sent."""
    with ExitStack() as opened:
        sockets = []
        for data in sent:
            one = socket.socket()
            opened.callback(one.close)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(20)
            one.connect(("127.0.0.1", server.port))
            one.sendall(data)
            sockets.append(one)
        yield sockets


def answer(connection: socket.socket) -> bytes:
    """One whole answer: its head and its body can arrive apart."""
    said = bytearray()
    while b"\r\n\r\n" not in said:
        said += connection.recv(4096)
    head = bytes(said).partition(b"\r\n\r\n")[0]
    (length,) = (int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    while len(said) < len(head) + 4 + length:
        said += connection.recv(4096)
    return bytes(said)


def rest(connection: socket.socket) -> bytes:
    """What is sent until the connection ends."""
    said = bytearray()
    try:
        while data := connection.recv(4096):
            said += data
    except ConnectionError:
        pass
    return bytes(said)


def sends(connection: socket.socket, data: bytes) -> bool:
    """Send, and tell whether the connection had not ended."""
    try:
        connection.send(data)
    except ConnectionError:
        return False
    return True


@pytest.mark.parametrize("part", ["head", "body", "chunks"])
def test_request_that_dribbles_in_is_ended_while_others_are_served(impatient: Server, part: str) -> None:
    drop = {"head": b"x", "body": b" ", "chunks": b"1\r\n \r\n"}[part]
    with connected(impatient, *[UNFINISHED[part]] * 20) as slow:
        while sum(sends(one, drop) for one in slow) == len(slow):
            assert httpx.post(f"{impatient.url}/v1/completions", json=ASK).status_code == 200
        until(lambda: sum(sends(one, drop) for one in slow) == 0)


@pytest.mark.parametrize("part", UNFINISHED)
def test_request_that_stops_halfway_is_told_so(impatient: Server, part: str) -> None:
    with connected(impatient, UNFINISHED[part]) as (connection,):
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    if part == "nothing":
        assert head == b""
    else:
        assert head.startswith(b"HTTP/1.1 408 ")
        assert "0.5 s" in json.loads(body)["error"]["message"]


def test_head_request_that_stops_halfway_is_told_so_without_a_body(impatient: Server) -> None:
    begun = UNFINISHED["body"].replace(b"POST /v1/completions", b"HEAD /health")
    with connected(impatient, begun) as (connection,):
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert said.endswith(b"\r\n\r\n")


def test_body_that_was_refused_already_cannot_dribble_on(serve: Serve) -> None:
    with (
        serve(connection=Impatient, api_keys=("secret",)) as server,
        connected(server, UNFINISHED["body"]) as (connection,),
    ):
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")
        until(lambda: not sends(connection, b" "))


def test_body_that_was_refused_already_can_be_malformed(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serve(connection=Impatient, api_keys=("secret",)) as server,
        connected(server, UNFINISHED["chunks"]) as (connection,),
    ):
        assert answer(connection).startswith(b"HTTP/1.1 401 ")
        connection.sendall(b"no length of a chunk\r\n" * 99)
        assert rest(connection) == b""
    assert "Traceback" not in caplog.text


def test_connections_in_use_are_not_timed(impatient: Server) -> None:
    with httpx.Client(base_url=impatient.url) as client:
        body = {**ASK, "max_tokens": 200, "temperature": 2, "n": 16}
        started = time.monotonic()
        while time.monotonic() < started + 2 * Impatient.request_seconds:
            assert client.post("/v1/completions", json=body, timeout=60).status_code == 200


def test_flood_of_silent_connections_makes_room_for_requests(serve: Serve) -> None:
    with serve(connection=Crowded) as server, connected(server, *[b""] * 50) as silent:
        assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 200
        ended = [rest(one) for one in silent[: 50 - Crowded.most_waiting]]
        assert set(ended) == {b""}
        silent[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert rest(silent[-1]).startswith(b"HTTP/1.1 200 ")


def stream(n: int) -> bytes:
    body = {"model": "demo", "prompt": "x", "max_tokens": 240, "temperature": 1, "stream": True, "n": n}
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("how", ["stops reading", "closes its side", "resets"])
def test_client_that_goes_in_the_middle_of_a_stream_frees_its_slot(impatient: Server, how: str) -> None:
    scheduler = impatient.service.scheduler
    before = impatient.metric("alignez_generated_tokens_total")
    cancelled = impatient.metric("alignez_cancelled_requests_total")
    with connected(impatient, stream(100)) as (connection,):
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert scheduler.n_waiting > 50
        if how == "closes its side":
            connection.shutdown(socket.SHUT_WR)
        elif how == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        until(lambda: scheduler.n_waiting == 0 and scheduler.n_running == 0)
        until(lambda: impatient.metric("alignez_cancelled_requests_total") == cancelled + 1)
    assert impatient.metric("alignez_generated_tokens_total") - before < 80 * 240


def test_slow_reader_of_a_short_answer_gets_all_of_it(impatient: Server) -> None:
    with connected(impatient, stream(2).replace(b"127.0.0.1\r\n", b"localhost\r\nConnection: close\r\n")) as (
        connection,
    ):
        said = bytearray()
        while data := connection.recv(2000):
            said += data
            time.sleep(0.002)
    assert said.count(b'"finish_reason": "') == 2
    assert b"data: [DONE]" in said


def test_head_beyond_the_limit_is_refused(impatient: Server) -> None:
    for size, status in ((HEAD_BYTES - 500, 200), (HEAD_BYTES + 1, 431)):
        response = httpx.get(f"{impatient.url}/health", headers={"X-Long": "x" * size})
        assert response.status_code == status
    assert str(HEAD_BYTES) in response.json()["error"]["message"]


def test_head_that_never_ends_is_not_kept(impatient: Server) -> None:
    with connected(impatient, HEAD) as (connection,):
        n_sent = 0
        while sends(connection, b"X-Long: " + b"x" * 1000 + b"\r\n"):
            n_sent += 1
            time.sleep(0.001)
        assert n_sent < 100


@pytest.mark.parametrize("said", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 99])
def test_what_is_not_http_is_refused(impatient: Server, said: bytes) -> None:
    with connected(impatient, said) as (connection,):
        assert rest(connection)[:13] in (b"HTTP/1.1 400 ", b"")
    assert httpx.get(f"{impatient.url}/health").status_code == 200


def test_upgrade_to_a_websocket_is_not_offered(impatient: Server) -> None:
    asked = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    response = httpx.get(f"{impatient.url}/health", headers={**asked, "Sec-WebSocket-Key": "x" * 24})
    assert response.status_code == 200


def test_answer_that_nobody_reads_ends_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_MOST_UNREAD", 3)

    async def read_late() -> list[object]:
        stream = ResponseStream([SequenceRequest((1,), Sampling(9))])
        for _ in range(9):
            stream.queued[0].listen(TextDelta("x"))
        await asyncio.sleep(0)
        assert stream.queued[0].cancelled
        events = stream.events()
        heard: list[object] = [await anext(events) for _ in range(3)]
        with pytest.raises(ApiError, match="not being read"):
            await anext(events)
        return heard

    assert asyncio.run(read_late()) == [(0, TextDelta("x"))] * 3


def test_requests_of_clients_that_left_do_not_pile_up(serve: Serve) -> None:
    with serve(n_parallel=2, queue=10) as server:
        scheduler = server.service.scheduler
        tokens = tuple(server.service.model.tokenize("x"))
        running = [QueuedRequest(SequenceRequest(tokens, Sampling(240)), lambda _: None) for _ in range(8)]
        scheduler.submit(running, "me")
        for _ in range(1000):
            left = QueuedRequest(SequenceRequest(tokens, Sampling(240)), lambda _: None)
            scheduler.submit([left], "me")
            left.cancel()
        assert len(scheduler._queue) < 40
        for queued in running:
            queued.cancel()
