"""The routes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from alignez_gguf.engines.llama.batching import SequenceRequest
from alignez_gguf.server.errors import ApiError, install
from alignez_gguf.server.limits import Admission
from alignez_gguf.server.metrics import Metrics
from alignez_gguf.server.openai_schema import ChatBody, CompletionBody, GenerationBody, SteeringDefaults
from alignez_gguf.server.openapi import (
    ANSWER,
    HEALTH,
    METRICS,
    MODEL,
    MODELS,
    SET_STEERING,
    STEERING,
    describe,
)
from alignez_gguf.server.reply import Choice, Reply
from alignez_gguf.server.service import Service
from alignez_gguf.server.shapes import Frame

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}
_CLIENT_IS_GONE = 499  # nginx's word for it; nobody reads it


def create_app(service: Service, *, api_keys: Iterable[str] = ()) -> FastAPI:
    """The application over a service, which it closes when it shuts down.

    Args:
        service: the model.
        api_keys: one of them is wanted from every client; none: no key is.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    install(app)
    scheduler = service.scheduler
    metrics = Metrics(lambda: scheduler.n_waiting, lambda: scheduler.n_running)
    app.state.service, app.state.metrics = service, metrics
    for path, (name, kind) in _PAGE.items():
        content = (files(__package__) / "page" / name).read_bytes()
        app.add_api_route(path, _static(content, kind), methods=["GET"], include_in_schema=False)
    _add_routes(app)
    open_paths = frozenset({"/health", *_PAGE})
    keys = tuple(api_keys)
    document = describe(app, service, needs_key=bool(keys), open_paths=open_paths)
    app.openapi = lambda: document  # type: ignore[method-assign]
    paths = [path for route in app.routes if (path := getattr(route, "path", "")) and "{" not in path]
    app.add_middleware(
        Admission,
        metrics=metrics,
        api_keys=keys,
        body_bytes=service.limits.body_bytes,
        paths=paths,
        open_paths=open_paths,
    )
    return app


def _add_routes(app: FastAPI) -> None:
    """All but the page. They answer with what they please: `response_model=None`."""
    told: dict[str, Any] = {"response_model": None}
    told_json: dict[str, Any] = told | {"dependencies": [Depends(_require_json)]}
    app.get("/health", responses=HEALTH, **told)(_health)
    app.get("/metrics", responses=METRICS, response_class=PlainTextResponse, **told)(_metrics)
    app.get("/v1/models", responses=MODELS, **told)(_models)
    app.get("/v1/models/{name:path}", responses=MODEL, **told)(_model)
    app.get("/v1/steering", responses=STEERING, **told)(_steering)
    app.put("/v1/steering", responses=SET_STEERING, **told_json)(_set_steering)
    app.post("/v1/chat/completions", responses=ANSWER, **told_json)(_chat)
    app.post("/v1/completions", responses=ANSWER, **told_json)(_complete)


async def _require_json(request: Request) -> None:
    """Refuse a body that says it is something else, as one that a page of another site sends has to."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body has to be JSON; send it with Content-Type: application/json")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_service)]


def _static(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return page


async def _health(service: Served) -> JSONResponse:
    alive = service.scheduler.is_alive
    return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)


async def _metrics(request: Request) -> Response:
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _models(service: Served) -> dict[str, Any]:
    return {"object": "list", "data": [_description(service)]}


async def _model(name: str, service: Served) -> dict[str, Any]:
    service.require_model(name)
    return _description(service)


def _description(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "alignez-gguf",
        "context_length": service.n_ctx,
        "controls": list(service.controls.files),
    }


async def _steering(service: Served) -> dict[str, Any]:
    return service.controls.document()


async def _set_steering(body: SteeringDefaults, service: Served) -> dict[str, Any]:
    service.controls.set_default(body.strength, body.scope, body.control)
    return service.controls.document()


async def _chat(body: ChatBody, request: Request, service: Served) -> Response:
    service.require_model(body.model)
    steering = service.steering(body.steering)
    requests = await _read(service, service.chat_requests, body, steering)
    frame = _frame(service, True, steering, requests, body)
    return await _answer(request, body, frame)


async def _complete(body: CompletionBody, request: Request, service: Served) -> Response:
    service.require_model(body.model)
    steering = service.steering(body.steering)
    requests = await _read(service, service.completion_requests, body, steering)
    frame = _frame(service, False, steering, requests, body)
    return await _answer(request, body, frame)


async def _read(
    service: Service, read: Callable[..., list[SequenceRequest]], *arguments: Any
) -> list[SequenceRequest]:
    """Templates and tokenizers can take long over a long prompt."""
    return await asyncio.get_running_loop().run_in_executor(service.readers, read, *arguments)


def _frame(
    service: Service, is_chat: bool, steering: Any, requests: list[SequenceRequest], body: GenerationBody
) -> Frame:
    fingerprint = f"fp_{service.model.info.fingerprint[:12]}"
    prompt_tokens = sum(len(request.tokens) for request in requests[:: body.n])
    return Frame(is_chat, service.name, fingerprint, steering, requests, prompt_tokens)


async def _answer(request: Request, body: GenerationBody, frame: Frame) -> Response:
    service, metrics = _service(request), request.app.state.metrics
    reply = service.submit(frame.requests, request.state.client)
    metrics.prompt_tokens.inc(frame.prompt_tokens)
    if body.stream:
        stream = _stream(reply, frame, body.stream_options.include_usage, metrics)
        return StreamingResponse(
            stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
    try:
        choices = await _unless_client_leaves(request, reply)
    finally:
        _count(reply, metrics)
        reply.cancel()
    if choices is None:
        return Response(status_code=_CLIENT_IS_GONE)
    return JSONResponse(frame.whole(choices, reply.n_tokens))


async def _unless_client_leaves(request: Request, reply: Reply) -> list[Choice] | None:
    """The whole answer, or None where nobody waits for it any more."""
    choices: list[Choice] | None = None
    failure: ApiError | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            choices = await reply.collect()
        except ApiError as error:  # a task group would wrap it
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return choices


async def _stream(reply: Reply, frame: Frame, include_usage: bool, metrics: Metrics) -> AsyncIterator[str]:
    """Server-sent events. Starlette closes this where the client leaves."""
    started, waits = time.monotonic(), True
    try:
        if frame.is_chat:
            for index in range(len(frame.requests)):
                yield _event(frame.opening(index))
        async with aclosing(reply.events()) as events:
            async for index, event in events:
                if waits:
                    metrics.first_token_seconds.observe(time.monotonic() - started)
                    waits = False
                yield _event(frame.chunk(index, event))
        if include_usage:
            yield _event(frame.usage_chunk(reply.n_tokens))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        _count(reply, metrics)
        reply.cancel()


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _count(reply: Reply, metrics: Metrics) -> None:
    metrics.generated_tokens.inc(reply.n_tokens)
    if not reply.is_complete:
        metrics.cancelled.inc()
