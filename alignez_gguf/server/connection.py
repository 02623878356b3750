"""One connection of a client, which can hold it open neither by sending slowly nor by not reading.

Uvicorn alone times out only a connection on which nothing at all arrives between two requests.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignez_gguf.server.errors import ApiError
from alignez_gguf.server.limits import HEAD_BYTES


class Connection(H11Protocol):
    """Uvicorn's HTTP/1.1 with limits to patience; a subclass can have other ones.

    Attributes:
        request_seconds: a request has to arrive in whole, head and body, within so long.
        reading_seconds: what is sent has to be taken within so long.
        most_waiting: connections without a whole request; the one that has waited longest makes room.
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
            one: one._request_timer.when()
            for one in self.connections
            if isinstance(one, Connection) and one._request_timer and not one.transport.is_closing()
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
