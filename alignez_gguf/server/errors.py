"""Errors in the shape of OpenAI's API, so that its clients raise what their users know."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from alignez_gguf.errors import AlignezError

_LOG = logging.getLogger(__name__)

_LONGEST_NAME = 64
_MESSAGES = {"extra_forbidden": "this server does not know it; leave it out"}
"""In place of pydantic's own."""
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: the HTTP status.
        message: what is wrong and how to fix it.
        code: OpenAI's name for the error, which programs can test.
        param: the field of the request that is at fault.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def _field(error: Mapping[str, Any]) -> str | None:
    """Return the field at fault, as OpenAI writes it: `messages[1].content`; None for the whole body."""
    if error["type"] == "json_invalid":
        return None  # the location is a number of characters
    path = list(error["loc"][1:])  # it begins with "body"
    if error["type"] == "refused_field":
        path.append(error["ctx"]["name"])
    named = [f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in path]
    return "".join(named).removeprefix(".") or None


def _shown(name: str) -> str:
    """Return a name that a client chose, in one line and not too long."""
    return name if name.isidentifier() and len(name) <= _LONGEST_NAME else repr(name[:_LONGEST_NAME])


def _methods(request: Request) -> set[str]:
    """Return the methods of a path; Starlette names those of the first route only."""
    fitting = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    methods = {method for route in fitting for method in getattr(route, "methods", None) or ()}
    return methods | {"HEAD"} if "GET" in methods else methods  # see `Admission`


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of a route with an error body of OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(AlignezError)
    async def refused(_: Request, error: AlignezError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = _field(first)
        message = _MESSAGES.get(first["type"], first["msg"])
        return ApiError(400, f"{param}: {message}" if param else message, param=param).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, message).response()
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(sorted(_methods(request)))
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        _LOG.error("a request failed", exc_info=error)
        return ApiError(500, "the server met an error of its own; its log says more").response()
