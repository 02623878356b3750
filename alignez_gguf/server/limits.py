"""The limits that a client meets before a route sees its request: time, host, key and size.

`Connection` ends clients that send slowly or do not read; uvicorn alone times out only a connection on which
nothing at all arrives between two requests. `Admission` checks each whole request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable
from contextlib import suppress
from typing import ClassVar

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignez_gguf.server.errors import ApiError
from alignez_gguf.server.metrics import Metrics

HEAD_BYTES = 16 << 10
"""The longest head of a request, in bytes."""

_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class Admission:
    """Wraps an ASGI application, and lets only admissible requests through.

    For the routes, HEAD is GET, and a path that ends in a slash is the one without.

    Args:
        app: the application that is guarded.
        metrics: counts the responses.
        api_keys: a request has to send one of them, except on `open_paths`. Without any, the request has
            to name this machine as its host, since a web page elsewhere could let its own name point here.
        body_bytes: the longest body, in bytes.
        paths: the paths that are counted under their own name.
        open_paths: the paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        api_keys: Iterable[str],
        body_bytes: int,
        paths: Iterable[str],
        open_paths: Iterable[str],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = [_digest(key.encode("utf-8", "surrogateescape")) for key in api_keys]
        self._body_bytes = body_bytes
        self._paths = frozenset(paths)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        scope = {**scope, "path": scope["path"].removesuffix("/") or "/"}
        if is_head:
            scope["method"] = "GET"
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
                self._metrics.requests.labels(path, str(message["status"])).inc()
            elif is_head:
                message["body"] = b""
            await send(message)

        try:
            self._admit(scope)
            replayed = await self._whole_body(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, send_counted)
            return
        if replayed is not None:
            await self._app(scope, replayed, send_counted)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        n_bytes = len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers.raw)
        if n_bytes > HEAD_BYTES:
            raise ApiError(431, f"the head of the request is longer than {HEAD_BYTES} bytes; send less")
        key = b""
        if not self._keys:
            host = headers.get("host", "")
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in _LOCAL:
                raise ApiError(403, f"the host {host!r} is not this machine; use http://127.0.0.1")
        elif scope["path"] not in self._open_paths:
            key = _digest(headers.get("authorization", "").encode("latin-1").removeprefix(b"Bearer "))
            # Every key is compared, each in constant time.
            if not sum(hmac.compare_digest(key, known) for known in self._keys):
                raise ApiError(
                    401, "the API key is wrong or missing; send it as a bearer token", code="invalid_api_key"
                )
        address = scope["client"][0] if scope.get("client") else ""
        scope.setdefault("state", {})["client"] = (key, address)

    async def _whole_body(self, headers: Headers, receive: Receive) -> Receive | None:
        """Read the body, and give the application a way to read it again; None where the client leaves."""
        too_long = ApiError(413, f"the body is longer than {self._body_bytes} bytes; send less")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._body_bytes:
            raise too_long
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._body_bytes:
                raise too_long
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay


def _digest(key: bytes) -> bytes:
    """Hash a key, so that keys of any length compare in the same time."""
    return hashlib.sha256(key).digest()


class Connection(H11Protocol):
    """A connection of uvicorn's HTTP/1.1 with time limits; a subclass can have other ones.

    Attributes:
        request_seconds: the time in which a request has to arrive in whole, head and body.
        reading_seconds: the time in which the client has to take what is sent.
        most_waiting: the most connections without a whole request; beyond them the oldest is ended.
    """

    request_seconds: ClassVar[float] = 30
    reading_seconds: ClassVar[float] = 30
    most_waiting: ClassVar[int] = 256

    _request_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Then `pause_writing` comes as soon as the client's side is full, and not 64 KiB later.
        transport.set_write_buffer_limits(high=0)
        self._time_request()
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._request_timer, self._reading_timer):
            if timer is not None:
                timer.cancel()
        self._request_timer = self._reading_timer = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_timer = self.loop.call_later(self.reading_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_timer is not None:
            self._reading_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP or has too long a head."""
        limit = f"send HTTP/1.1, with a head of at most {HEAD_BYTES} bytes"
        self._refuse(ApiError(400, f"{msg.rstrip('.')}; {limit}"))

    def _time_request(self) -> None:
        """Let the clock run while a whole request is waited for, and only then."""
        waits = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()
        if waits and self._request_timer is None:
            self._request_timer = self.loop.call_later(self.request_seconds, self._end_slow_request)
        elif not waits and self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _end_slow_request(self) -> None:
        self._request_timer = None
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.abort()  # nothing has arrived that could be answered
        else:
            limit = f"the request did not arrive within {self.request_seconds:g} s"
            self._refuse(ApiError(408, f"{limit}; send it faster"))

    def _make_room(self) -> None:
        """End the connection that has waited longest, where too many wait."""
        if len(self.connections) <= self.most_waiting:
            return
        waiting = {
            connection: connection._request_timer.when()
            for connection in self.connections
            if isinstance(connection, Connection)
            and connection._request_timer
            and not connection.transport.is_closing()
        }
        if len(waiting) > self.most_waiting:
            min(waiting, key=waiting.__getitem__).transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer in place of the application, where it has not begun to, and end the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        head = h11.Response(status_code=error.status, headers=headers)
        with suppress(h11.LocalProtocolError):  # it takes no body for an answer to HEAD
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
