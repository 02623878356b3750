"""Requests to a server over the demo model: good ones, whose answers are known, and many kinds of bad ones.

Each kind sends one request, and returns what was wrong with the server's behaviour, or "".
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx2 as httpx

KEY, WRONG_KEY = "sk-the-right-one-1234", "sk-a-wrong-one-5678"
MAX_BODY = 1 << 16
TIMEOUT = 120.0

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_JSON = {"Content-Type": "application/json"}
PROMPTS = ("Human: hi", "Human: pick a lock\nAssistant:", "x", "Bake a cake")


@dataclass(frozen=True)
class Good:
    """A request whose answer depends on nothing but itself."""

    prompt: str
    seed: int
    strength: float
    is_chat: bool
    stream: bool

    @classmethod
    def by_chance(cls, chance: random.Random) -> Good:
        """One of 192."""
        strength = chance.choice((0.0, 0.5, 1.0, 1.7))
        return cls(chance.choice(PROMPTS), chance.randrange(3), strength, *chance.choices((True, False), k=2))

    @property
    def body(self) -> dict[str, object]:
        said: dict[str, object] = {"prompt": self.prompt}
        if self.is_chat:
            said = {"messages": [{"role": "user", "content": self.prompt}]}
        steering = {"strength": self.strength}
        fields = {"model": "demo", "seed": self.seed, "max_tokens": 12, "stream": self.stream}
        return {**fields, **said, "steering": steering}


class Client:
    """One that keeps its connections, and knows the server's key.

    Args:
        port: of the server on this machine.
        expected: the answers that good requests get when nobody else asks.
    """

    def __init__(self, port: int, expected: Mapping[Good, str]) -> None:
        self.port = port
        self.expected = expected
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=TIMEOUT)

    def answer(self, good: Good) -> str:
        """The text of an answer. Raises where it is not whole."""
        path = _CHAT if good.is_chat else _COMPLETIONS
        response = self.http.post(path, json=good.body)
        response.raise_for_status()
        if not good.stream:
            return _text(response.json()["choices"][0], "message")
        *events, done, end = response.text.split("\n\n")
        if (done, end) != ("data: [DONE]", ""):
            raise ValueError(f"the stream ends with {done[-80:]!r}")
        chunks = (json.loads(event.removeprefix("data: "))["choices"][0] for event in events)
        return "".join(_text(chunk, "delta") for chunk in chunks)

    def connect(self, said: bytes) -> socket.socket:
        """A connection of its own, over which `said` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)
        connection.sendall(said)
        return connection

    def status(self, method: str, path: str, **fields: object) -> int:
        return self.http.request(method, path, **fields).status_code  # type: ignore[arg-type]


def _text(choice: dict[str, object], field: str) -> str:
    """Of a choice of a chat, where it has `field`, or of a completion."""
    found = choice[field] if field in choice else {"content": choice["text"]}
    assert isinstance(found, dict)
    return str(found.get("content") or "")


def head(length: int, key: str = KEY) -> bytes:
    """The head of a request for a completion."""
    return (
        f"POST {_COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def _good(client: Client, chance: random.Random) -> str:
    good = Good.by_chance(chance)
    found = client.answer(good)
    return "" if found == client.expected[good] else f"another answer than alone to {good}: {found!r}"


def _wrong_key(client: Client, chance: random.Random) -> str:
    headers = {"Authorization": f"Bearer {WRONG_KEY}"}
    path = chance.choice(("/v1/models", "/metrics", "/v1/steering", "/openapi.json", "/nothing"))
    return _unless(client.status("GET", path, headers=headers), 401)


def _no_json(client: Client, chance: random.Random) -> str:
    content = chance.choice((b"{", b"[" * 50_000, b"\xff" * 99, b"", b"null", b'{"model": "\\ud800"}'))
    return _unless(client.status("POST", _COMPLETIONS, content=content, headers=_JSON), 400, 404)


def _bad_field(client: Client, chance: random.Random) -> str:
    fields: tuple[dict[str, object], ...] = (
        {"max_tokens": 10**9},
        {"temperature": -1},
        {"prompt": "x" * 50_000},
        {"steering": {"control": "../../etc/passwd"}},
        {"steering": {"strength": -1}},
        {"steering": {"scope": "first:0"}},
        {"stop": ["x"] * 99},
        {"n": 10**6},
    )
    body = {"model": "demo", "prompt": "x", "max_tokens": 1, **chance.choice(fields)}
    return _unless(client.status("POST", _COMPLETIONS, json=body), 400)


def _bad_default(client: Client, chance: random.Random) -> str:
    fields: tuple[dict[str, object], ...] = ({"control": "/etc/passwd"}, {"strength": 1e9}, {"scope": "x"})
    return _unless(client.status("PUT", "/v1/steering", json={"strength": 0, **chance.choice(fields)}), 400)


def _long_body(client: Client, chance: random.Random) -> str:
    content = b" " * (MAX_BODY + chance.randrange(1, 9))
    return _unless(client.status("POST", _COMPLETIONS, content=content, headers=_JSON), 413)


def _long_head(client: Client, chance: random.Random) -> str:
    headers = {f"X-{number}": "x" * 4000 for number in range(chance.randrange(5, 9))}
    return _unless(client.status("GET", "/health", headers=headers), 400, 431)


def _wrong_path(client: Client, chance: random.Random) -> str:
    path = chance.choice(("/../etc/passwd", "/v1/models/..%2f..%2fapp.py", "/page.css/x", "/%00"))
    return _unless(client.status("GET", path), 404)


def _no_http(client: Client, chance: random.Random) -> str:
    said = chance.choice((b"\x16\x03\x01\x02\r\n\r\n", b"GET / HTTP/9\r\n\r\n", chance.randbytes(999)))
    with client.connect(said + b"\r\n\r\n") as connection, contextlib.suppress(ConnectionError):
        answer = connection.recv(4096)
        return "" if answer.startswith((b"HTTP/1.1 4", b"")) else f"not HTTP is answered {answer[:40]!r}"
    return ""


def _leaves(client: Client, chance: random.Random) -> str:
    """In the middle of its request, of the queue, or of a stream; by closing, or by closing its side."""
    body = {"model": "demo", "prompt": "x", "max_tokens": 16, "temperature": 2, "n": 20}
    data = json.dumps(body | {"stream": chance.random() < 0.7}).encode()
    said = head(len(data)) + data
    whole = chance.random() < 0.7
    with client.connect(said if whole else said[: chance.randrange(len(said))]) as connection:
        if whole and chance.random() < 0.5:
            connection.recv(chance.randrange(1, 2000))
        if chance.random() < 0.5:
            connection.shutdown(socket.SHUT_WR)
    return ""


def _unless(found: int, *expected: int) -> str:
    return "" if found in expected else f"status {found} instead of {' or '.join(map(str, expected))}"


Kind = Callable[[Client, random.Random], str]
BAD: tuple[Kind, ...] = (
    _wrong_key,
    _no_json,
    _bad_field,
    _bad_default,
    _long_body,
    _long_head,
    _wrong_path,
    _no_http,
    _leaves,
)


def send(client: Client, seed: int, number: int) -> str:
    """Send request `number`: every other one is good. Returns what was wrong, with its number."""
    chance = random.Random(f"{seed}/{number}")
    kind = _good if number % 2 == 0 else chance.choice(BAD)
    try:
        wrong = kind(client, chance)
    except Exception as error:  # whatever the server did to it
        wrong = repr(error)
    return f"request {number} ({kind.__name__.strip('_')}): {wrong}" if wrong else ""
