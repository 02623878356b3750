"""Chat completions from an OpenAI-compatible endpoint, several at a time, for judges."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass

from anyio.from_thread import start_blocking_portal

from alignez_gguf.engines.endpoint import KEY_VARIABLE, OpenAIServer, model_ids
from alignez_gguf.engines.json_api import ClientError, JsonApi
from alignez_gguf.errors import EndpointError

_SHOWN_MODELS = 10


@dataclass(frozen=True)
class ChatRequest:
    """A single message of a user, and how the reply is sampled."""

    message: str
    temperature: float = 0.0
    seed: int = 0


class ChatEndpoint(OpenAIServer):
    """Replies over `POST {url}/v1/chat/completions`.

    Args:
        url: the address of the server, with or without the `/v1` at its end.
        model: the id of the model there; None takes the only one that the server has.
        api_key: by default the environment variable `ALIGNEZ_API_KEY`; it is never shown.
        concurrency: number of requests that run at a time.
        max_tokens: the greatest length of a reply.
        timeout: seconds for one reply.
        retries: attempts after the first where the server is busy, out of reach or answers with broken JSON.

    Raises:
        EndpointError: the URL or the key cannot be used, or the server does not say which model it has.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        max_tokens: int = 400,
        timeout: float = 300.0,
        retries: int = 6,
    ) -> None:
        super().__init__(url, api_key=api_key, concurrency=concurrency, timeout=timeout, retries=retries)
        self._max_tokens = max_tokens
        self.model = model or self._only_model()

    def replies(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, str]]:
        """Yield the index of every request with its reply, as soon as it arrives.

        Raises:
            EndpointError: the server refuses a request, or cannot be reached after all attempts.
        """
        if not requests:
            return
        limiter = asyncio.Semaphore(self._concurrency)
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self._api()) as api:

            async def reply(request: ChatRequest) -> str:
                async with limiter:
                    return await self._ask(api, "/chat/completions", self._body(request))

            running = {portal.start_task_soon(reply, request): n for n, request in enumerate(requests)}
            refused: EndpointError | None = None
            waiting = dict(running)
            try:
                for finished in as_completed(running):
                    try:
                        reply_text = finished.result()
                    except EndpointError as error:
                        refused = error
                        break
                    yield waiting.pop(finished), reply_text
                if refused is not None:
                    # Replies that are there have been paid for: they are given before the error.
                    for finished, index in waiting.items():
                        if finished.done() and not finished.cancelled() and finished.exception() is None:
                            yield index, finished.result()
                    raise refused
            finally:
                for future in running:
                    future.cancel()

    def _body(self, request: ChatRequest) -> dict[str, object]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": request.message}],
            "max_tokens": self._max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }

    async def _ask(self, api: JsonApi, path: str, body: object | None) -> str:
        try:
            return await api.ask(path, body, _content)
        except ClientError as error:
            raise EndpointError(f"{self.url} answers {error}; {self._mend(error)}") from error

    def _mend(self, error: ClientError) -> str:
        if error.status in (401, 403):
            given = "another key" if self._key else "the key"
            return f"give {given} in the environment variable {KEY_VARIABLE}"
        if error.status == 404:
            return "is this an OpenAI-compatible server with chat completions, and is --judge-model right?"
        return "choose a judge that takes messages of this length, or change the server's settings"

    def _only_model(self) -> str:
        async def ask() -> list[str]:
            async with self._api() as api:
                try:
                    return await api.ask("/models", None, model_ids)
                except ClientError as error:
                    raise EndpointError(f"{self.url} answers {error}; {self._mend(error)}") from error

        with start_blocking_portal() as portal:
            models = portal.call(ask)
        if len(models) != 1:
            listed = ", ".join(models[:_SHOWN_MODELS]) or "none"
            raise EndpointError(
                f"{self.url} has several models or none ({listed}); name one with --judge-model"
            )
        return models[0]


def _content(document: object) -> str:
    """Read a reply. Raises LookupError or TypeError where it is none."""
    if not isinstance(document, dict):
        raise TypeError("not an object")
    content = document["choices"][0]["message"]["content"]
    # A server says null where a model only thought, or was cut off before it said anything.
    if content is not None and not isinstance(content, str):
        raise TypeError("the content is not a string")
    return content or ""
