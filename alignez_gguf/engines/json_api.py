"""JSON over HTTP from servers that are busy, restarting or far away: temporary failures are retried.

Knows status codes and waiting, not the meaning of a request.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

import anyio
import httpx2 as httpx

from alignez_gguf.errors import EndpointError

_T = TypeVar("_T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first new attempt, which double with each, and the most that they become."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds of a Retry-After header that are waited out; a server that asks for more is reported."""
_CONNECT_SECONDS = 10.0
_MESSAGE_CHARACTERS = 300

_log = logging.getLogger(__name__)


class ClientError(Exception):
    """The server refuses a request for good; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _PassingError(Exception):
    """A failure that may be over at the next attempt; the server asks for `wait` seconds before it."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class JsonApi:
    """A client of one server.

    Args:
        url: the address that paths are appended to.
        key: sent as a bearer token, never shown.
        timeout: seconds for one whole answer.
        retries: attempts after the first.
        connections: the most connections that are open at a time.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float, retries: int, connections: int) -> None:
        self._url, self._key = url, key
        self._timeout, self._retries = timeout, retries
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=min(_CONNECT_SECONDS, timeout)),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> JsonApi:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def ask(self, path: str, body: object | None, read: Callable[[object], _T]) -> _T:
        """POST `body` (or GET, without one) and read the answer.

        Tried again, after exponentially growing, jittered pauses or as long as Retry-After says: no
        connection, one that breaks, time-outs, status 408, 425, 429 and 5xx, answers that are not JSON, and
        those in which `read` does not find what it looks for (it then raises LookupError or TypeError).

        Raises:
            ClientError: another status than success.
            EndpointError: the last attempt fails too.
        """
        attempt = 0
        while True:
            try:
                return await self._attempt(path, body, read)
            except _PassingError as error:
                if attempt == self._retries or (error.wait or 0) > LONGEST_RETRY_AFTER:
                    raise EndpointError(self._gave_up(attempt + 1, error)) from error
                wait = _pause(attempt) if error.wait is None else error.wait + _pause(0)
                _log.info("%s %s; trying again in %.1f s", self._url, error, wait)
            await anyio.sleep(wait)
            attempt += 1

    async def _attempt(self, path: str, body: object | None, read: Callable[[object], _T]) -> _T:
        try:
            with anyio.fail_after(self._timeout):
                response = await self._request(path, body)
        except TimeoutError as error:
            raise _PassingError(f"did not answer within {self._timeout:g} s") from error
        except httpx.RequestError as error:
            raise _PassingError(f"cannot be reached ({_reason(error)})") from error
        if response.is_success:
            try:
                return read(response.json())
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise _PassingError("answers with something that no such endpoint says") from error
        said = self._message(response)
        if response.status_code in (408, 425, 429) or response.is_server_error:
            raise _PassingError(f"answers {said}", _retry_after(response))
        raise ClientError(response.status_code, said)

    async def _request(self, path: str, body: object | None) -> httpx.Response:
        if body is None:
            return await self._client.get(self._url + path)
        # Not `json=`: it would fail for a lone surrogate, which a query from a JSON file can hold.
        content = json.dumps(body).encode("ascii")
        return await self._client.post(
            self._url + path, content=content, headers={"Content-Type": "application/json"}
        )

    def _message(self, response: httpx.Response) -> str:
        """The status and what the server says to it, in one line and without the key."""
        try:
            document = response.json()
        except (ValueError, RecursionError):
            document = None
        if response.is_redirect:
            document = f"go to {response.headers.get('location')}"
        said = _find_message(document) or (
            "" if "html" in response.headers.get("content-type", "") else response.text
        )
        if self._key:
            said = said.replace(self._key, "***")
        # Control characters too become spaces: a terminal would obey them.
        said = "".join(character if character.isprintable() else " " for character in said)
        said = " ".join(said.split())[:_MESSAGE_CHARACTERS].rstrip(".")
        return f"{response.status_code} {response.reason_phrase}" + (f": {said}" if said else "")

    def _gave_up(self, attempts: int, error: _PassingError) -> str:
        if error.wait is not None and error.wait > LONGEST_RETRY_AFTER:
            return f"{self._url} {error}, and asks to come back in {error.wait:.0f} s; try again then"
        times = "once" if attempts == 1 else f"{attempts} times"
        return f"{self._url} {error}, tried {times}; is it running, and can it take so many requests at once?"


def _pause(attempt: int) -> float:
    """Seconds after attempt number `attempt`, the first being 0.

    Half of the step is drawn, so that requests which were refused together do not come back together.
    """
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * random.uniform(0.5, 1.0)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, or a date (RFC 9110, section 10.2.3)."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _find_message(document: object) -> str:
    """The text in the shapes that OpenAI, vLLM, llama.cpp and FastAPI give an error."""
    if isinstance(document, str):
        return document
    if isinstance(document, list):
        return "; ".join(filter(None, map(_find_message, document)))
    if isinstance(document, dict):
        return next(filter(None, (_find_message(document.get(key)) for key in _MESSAGE_KEYS)), "")
    return ""


_MESSAGE_KEYS = ("error", "message", "detail", "msg")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
