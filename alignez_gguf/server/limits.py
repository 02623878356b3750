"""What every request passes before a route sees it: host, key and size.

For the routes, HEAD is GET, and a path that ends in a slash is the one without.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignez_gguf.server.errors import ApiError
from alignez_gguf.server.metrics import Metrics

HEAD_BYTES = 16 << 10
"""Of the head of a request."""

_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class Admission:
    """An ASGI application around another.

    Args:
        app: what is guarded.
        metrics: counts the answers.
        api_keys: one of them is wanted, except on `open_paths`; none: no key is wanted, but the request has
            to name this machine as its host, since a web page elsewhere could let its own name point here.
        body_bytes: the longest body.
        paths: those that are counted under their own name.
        open_paths: those that need no key.
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

        async def counted(message: Message) -> None:
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
            await error.response()(scope, receive, counted)
            return
        if replayed is not None:
            await self._app(scope, replayed, counted)

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
    """Keys of any length compare in the same time."""
    return hashlib.sha256(key).digest()
