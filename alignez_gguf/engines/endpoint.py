"""Text from an OpenAI-compatible completions endpoint: vLLM, llama-server, llama-cpp-python and many more.

Only `generate` of the engine's protocol: such a server shows no activations.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from functools import cached_property
from urllib.parse import urlsplit, urlunsplit

import httpx2 as httpx
from anyio.from_thread import start_blocking_portal

from alignez_gguf.engines.base import Completion, GenerationRequest, Sampling
from alignez_gguf.engines.json_api import ClientError, JsonApi
from alignez_gguf.engines.text import StopStringFilter
from alignez_gguf.errors import EndpointError, QueryError

KEY_VARIABLE = "ALIGNEZ_API_KEY"
_MOST_STOPS = 4
"""Stop strings that the protocol lets a request have; further ones are looked for here."""
_MOST_NAMED = 20
"""The most models that an error names."""


class OpenAIServer:
    """An OpenAI-compatible server, its key, and how its clients treat it.

    Args:
        url: the address of the server, with or without the `/v1` at its end.
        api_key: by default the environment variable `ALIGNEZ_API_KEY`; it is never shown.
        concurrency: the most requests at a time.
        timeout: seconds for one answer, the wait in the server's queue included.
        retries: attempts after the first where the server is busy, out of reach or answers with broken JSON.

    Raises:
        EndpointError: the URL or the key cannot be used.
    """

    def __init__(
        self, url: str, *, api_key: str | None, concurrency: int, timeout: float, retries: int
    ) -> None:
        self.url = base_url(url)
        self._key = usable_key(api_key)
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries

    def _api(self) -> JsonApi:
        return JsonApi(
            self.url,
            key=self._key,
            timeout=self._timeout,
            retries=self._retries,
            connections=self._concurrency,
        )


class EndpointGenerator(OpenAIServer):
    """Completes prompts over `POST {url}/v1/completions`, several at a time.

    What a server writes need not be the same twice, even for one seed: that is up to the server. So is what
    it does to the draws of its own accord, which the protocol has no field for: llama-cpp-python's server,
    for one, has a repetition penalty of 1.1, min-p .05 and top-k 40.

    Args:
        url: of the server, with or without the `/v1` at its end.
        model: its id there; None takes the only one that the server has.
        api_key: by default the environment variable `ALIGNEZ_API_KEY`; it is never shown.
        concurrency: requests that are under way at a time.
        timeout: seconds for one answer, the wait in the server's queue included.
        retries: attempts after the first where the server is busy, out of reach or answers with broken JSON.

    Raises:
        EndpointError: the URL or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 6,
    ) -> None:
        if concurrency < 1 or not timeout > 0 or retries < 0:
            raise ValueError("concurrency must be at least 1, timeout above 0 and retries not negative")
        super().__init__(url, api_key=api_key, concurrency=concurrency, timeout=timeout, retries=retries)
        self._model = model

    def __repr__(self) -> str:
        """Name what determines the texts: a work directory caches them under it."""
        return f"EndpointGenerator({self.url!r}, model={self._model!r})"

    @cached_property
    def model(self) -> str:
        """The id of the model at the server.

        Raises:
            EndpointError: the server cannot be reached or has not exactly one model, and none was named.
        """
        if self._model is not None:
            return self._model
        with start_blocking_portal() as portal:
            models = portal.call(self._ask_models)
        if len(models) != 1:
            raise EndpointError(f"{self.url} has {_listed(models)}; name one with --generator-model")
        return models[0]

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete all requests; each is yielded with its index as soon as it is finished.

        `n_tokens` is what the server counts (0 where it does not), which may include tokens behind a stop
        string that is only looked for here. `on_text` gets each text whole. The strengths of the requests are
        not the server's business. Closing the iterator, as an exception or Ctrl-C does, drops what is under
        way at once.

        Raises:
            QueryError: a prompt is empty.
            EndpointError: the server refuses a request, or cannot be reached after all attempts.
        """
        if not all(request.prompt for request in requests):
            raise QueryError("a prompt is empty; the model needs at least one character to go on from")
        if not requests:
            return
        model = self.model
        slots = asyncio.Semaphore(self._concurrency)
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self._api()) as api:

            async def complete(request: GenerationRequest) -> Completion:
                # Held during the pauses too: a server that is busy gets less to do, not other requests.
                async with slots:
                    return await self._complete(api, model, request, sampling)

            under_way = {portal.start_task_soon(complete, request): n for n, request in enumerate(requests)}
            try:
                for finished in as_completed(under_way):
                    completion = finished.result()
                    if on_text is not None and completion.text:
                        on_text(under_way[finished], completion.text)
                    yield under_way[finished], completion
            finally:
                for future in reversed(under_way):  # waiting requests before those that hold a slot
                    future.cancel()

    async def _complete(
        self, api: JsonApi, model: str, request: GenerationRequest, sampling: Sampling
    ) -> Completion:
        body: dict[str, object] = {
            "model": model,
            "prompt": request.prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # 31 bits: some servers have signed seeds, and to llama.cpp 32 ones mean "draw one".
            "seed": request.seed & 0x7FFFFFFF,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop[:_MOST_STOPS])
        try:
            return await api.ask("/completions", body, lambda document: _completion(document, sampling.stop))
        except ClientError as error:
            raise EndpointError(f"{self.url} answers {error}; {await self._remedy(error, model)}") from error

    async def _remedy(self, error: ClientError, model: str) -> str:
        """Say what the user can do about an error of the server."""
        if error.status in (401, 403):
            given = "another key" if self._key else "the key"
            return f"give {given} with --api-key or in the environment variable {KEY_VARIABLE}"
        if error.status == 404:
            try:
                models = await self._ask_models()
            except EndpointError:
                return "is this the address of an OpenAI-compatible server?"
            if model not in models:
                return f"it has no model {model}, but {_listed(models)}; name one with --generator-model"
            return "it has the model, but no /v1/completions; such a server cannot be used"
        if error.status < 400:
            return "give the address that it points to"
        return "ask for less (shorter prompts, fewer tokens), or change the server's settings"

    async def _ask_models(self) -> list[str]:
        async with self._api() as api:
            try:
                return await api.ask("/models", None, model_ids)
            except ClientError as error:
                remedy = "name the model with --generator-model"
                if error.status in (401, 403):
                    remedy = await self._remedy(error, "")
                raise EndpointError(f"{self.url}/models answers {error}; {remedy}") from error


def _completion(document: object, stop: Sequence[str]) -> Completion:
    """Read an answer. Raises LookupError or TypeError where it is not one."""
    if not isinstance(document, dict):
        raise TypeError("not an object")
    choice = document["choices"][0]
    if not isinstance(choice["text"], str):
        raise TypeError("the text is not a string")
    text = StopStringFilter(stop)
    # The decoder replaces a lone surrogate, which JSON can hold and UTF-8 cannot.
    text.feed(choice["text"].encode("utf-8", "surrogatepass"))
    text.finish()
    usage = document.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    cut = choice.get("finish_reason") == "length" and not text.stopped
    return Completion(
        text=text.text,
        n_tokens=tokens if isinstance(tokens, int) else 0,
        finish_reason="length" if cut else "stop",
    )


def model_ids(document: object) -> list[str]:
    """Read the ids of an answer of /v1/models. Raises LookupError or TypeError where it is none."""
    if not isinstance(document, dict):
        raise TypeError("not an object")
    return [str(model["id"]) for model in document["data"]]


def _listed(models: Sequence[str]) -> str:
    if not models:
        return "no model"
    more = f" and {len(models) - _MOST_NAMED} more" if len(models) > _MOST_NAMED else ""
    return f"the models {', '.join(models[:_MOST_NAMED])}{more}"


def base_url(url: str) -> str:
    """The URL that ends in /v1. Raises `EndpointError` for what is not the address of a server."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        httpx.URL(urlunsplit(parts))
    except (ValueError, httpx.InvalidURL) as error:
        raise EndpointError(f"{url} is not the address of a server: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise EndpointError(f"{url} is not the address of a server; give one like http://localhost:8000")
    if parts.username is not None:
        raise EndpointError("the address must not hold a user or a password; give the key with --api-key")
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, f"{path}/v1", "", ""))


def usable_key(given: str | None) -> str | None:
    """The key that is given, else that of the environment; `None` if it is empty. Raises `EndpointError`."""
    key = (given if given is not None else os.environ.get(KEY_VARIABLE, "")).strip()
    if not key.isascii() or not key.isprintable():
        raise EndpointError(
            f"the API key holds characters that no key has; check --api-key or {KEY_VARIABLE}"
        )
    return key or None
