"""Ways to ask a server that runs in this process."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import openai
import uvicorn

from alignez_gguf.server.app import create_app
from alignez_gguf.server.limits import Connection
from alignez_gguf.server.run import configuration, listen
from alignez_gguf.server.service import Service


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def begin(self, path: str, body: dict[str, Any], api_key: str = "none") -> socket.socket:
        """Send a request, and leave the answer unread."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {api_key}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + data)
        return connection


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for something that will happen in another thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def serving(
    service: Service, api_keys: tuple[str, ...] = (), connection: type[Connection] = Connection
) -> Iterator[Server]:
    """Serve within this process until the end of the block."""
    server = uvicorn.Server(configuration(create_app(service, api_keys=api_keys), connection=connection))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Server(listening.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join()
            service.close()
