"""Runs the application until it is told to stop, and then lets the answers under way end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address

import uvicorn
from fastapi import FastAPI

from alignez_gguf.errors import AlignezError
from alignez_gguf.server.app import create_app
from alignez_gguf.server.limits import HEAD_BYTES, Connection
from alignez_gguf.server.service import Service

_BACKLOG = 2048


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that waits for clients; port 0 takes a free one. Raises `AlignezError`."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
        # With the protocol named, as `socket.create_server` does not, asyncio sends small packets at once
        # (base_events._set_nodelay): a streamed token would wait 40 ms for an acknowledgement.
        listening = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would let two servers share a port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
        return listening
    except OSError as error:
        raise AlignezError(
            f"cannot listen on {host}, port {port} ({error.strerror or error}); choose another --port"
        ) from error


def configuration(
    app: FastAPI, *, grace_seconds: int = 30, connection: type[Connection] = Connection
) -> uvicorn.Config:
    """Return uvicorn's configuration: quiet, and with limits to what a client can hold."""
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        h11_max_incomplete_event_size=HEAD_BYTES,  # of what it holds before a head is whole
        log_level="error",  # a warning for each malformed request would let anybody fill the disk
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace_seconds,
        lifespan="on",
    )


def serve(
    service: Service,
    listening: socket.socket,
    *,
    api_keys: Sequence[str] = (),
    grace_seconds: int = 30,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM; then take no more requests, and give running ones `grace_seconds`."""
    config = configuration(create_app(service, api_keys=api_keys), grace_seconds=grace_seconds)
    server = _Server(config, on_ready)
    with _ended_by_signals():
        try:
            server.run(sockets=[listening])
        finally:
            service.close()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Uvicorn raises the signal that ended it once more when it has shut down; here that is no failure."""
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()
