"""A llama-server on a port of its own, and what the checks ask it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

MAX_TOKENS = 48
_PATIENCE = 300
"""Seconds."""


class LlamaServer:
    """Runs inside its `with` block; what it completes, it completes greedily."""

    def __init__(self, program: Path, model: Path, *options: str) -> None:
        port = free_port()
        self._address = f"http://127.0.0.1:{port}"
        self._command = [str(program), "-m", str(model), "--port", str(port), "--no-webui", *options]

    def complete(self, prompt: str, steering: dict[str, float] | None = None, **more: Any) -> str:
        return str(self.send("/completion", {**_request(prompt, steering), **more})["content"])

    def completions(self, prompt: str, more: dict[str, Any]) -> list[str]:
        """By the endpoint that OpenAI has."""
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, **more}
        return [str(choice["text"]) for choice in self.send("/v1/completions", body)["choices"]]

    def chats(self, query: str, steering: dict[str, float]) -> list[str]:
        """The answer to a query as OpenAI's two interfaces and Anthropic's give it."""
        asked = {"messages": [self.message(query)], "temperature": 0, "steering": steering}
        chat = self.send("/v1/chat/completions", {**asked, "max_tokens": MAX_TOKENS})
        message = self.send("/v1/messages", {**asked, "max_tokens": MAX_TOKENS})
        response = self.send(
            "/v1/responses",
            {"input": query, "temperature": 0, "steering": steering, "max_output_tokens": MAX_TOKENS},
        )
        return [
            str(chat["choices"][0]["message"]["content"]),
            str(message["content"][0]["text"]),
            str(response["output"][0]["content"][0]["text"]),
        ]

    @staticmethod
    def message(query: str) -> dict[str, str]:
        return {"role": "user", "content": query}

    def stream(self, prompt: str, steering: dict[str, float]) -> str:
        _, said = self.post("/completion", {**_request(prompt, steering), "stream": True})
        events = (line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: "))
        return "".join(json.loads(event)["content"] for event in events)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._address + path, timeout=_PATIENCE) as response:
            return json.load(response)

    def send(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a request that must succeed."""
        status, said = self.post(path, body)
        if status != 200:
            sys.exit(f"Error: llama-server answers {path} with {status}: {said}")
        return json.loads(said)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """The status and the text of the answer, whatever they are."""
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def __enter__(self) -> LlamaServer:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdin=quiet, stdout=quiet, stderr=quiet)
        deadline = time.monotonic() + _PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._is_ready():
                return self
            time.sleep(0.2)
        self._process.kill()
        sys.exit(f"Error: {' '.join(self._command)} does not start; run it by hand to see why")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def _is_ready(self) -> bool:
        try:
            self.get("/health")
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _request(prompt: str, steering: dict[str, float] | None) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": MAX_TOKENS, "temperature": 0}
    return body if steering is None else {**body, "steering": steering}
