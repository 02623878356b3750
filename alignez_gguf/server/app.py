"""The HTTP routes of the server."""

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
from alignez_gguf.server.errors import ApiError, install_error_handlers
from alignez_gguf.server.limits import Admission
from alignez_gguf.server.metrics import Metrics
from alignez_gguf.server.openai_schema import (
    ChatBody,
    CollectedChoice,
    CompletionBody,
    GenerationBody,
    ResponseBuilder,
    SteeringDefaults,
)
from alignez_gguf.server.openapi import (
    ANSWER_RESPONSES,
    HEALTH_RESPONSES,
    METRICS_RESPONSES,
    MODEL_RESPONSES,
    MODELS_RESPONSES,
    SET_STEERING_RESPONSES,
    STEERING_RESPONSES,
    openapi_document,
)
from alignez_gguf.server.service import ResponseStream, Service

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
    """Return the application over a service, which it closes when it shuts down.

    Args:
        service: the model.
        api_keys: every client has to send one of them; without any, no key is required.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    scheduler = service.scheduler
    metrics = Metrics(lambda: scheduler.n_waiting, lambda: scheduler.n_running)
    app.state.service, app.state.metrics = service, metrics
    for path, (name, kind) in _PAGE.items():
        content = (files(__package__) / "page" / name).read_bytes()
        app.add_api_route(path, _static(content, kind), methods=["GET"], include_in_schema=False)
    _add_routes(app)
    open_paths = frozenset({"/health", *_PAGE})
    keys = tuple(api_keys)
    document = openapi_document(app, service, needs_key=bool(keys), open_paths=open_paths)
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
    """Add all routes but the page. `response_model=None` lets each return what it likes."""
    route_options: dict[str, Any] = {"response_model": None}
    json_route_options: dict[str, Any] = route_options | {"dependencies": [Depends(_require_json)]}
    app.get("/health", responses=HEALTH_RESPONSES, **route_options)(_health)
    app.get("/metrics", responses=METRICS_RESPONSES, response_class=PlainTextResponse, **route_options)(
        _metrics
    )
    app.get("/v1/models", responses=MODELS_RESPONSES, **route_options)(_models)
    app.get("/v1/models/{name:path}", responses=MODEL_RESPONSES, **route_options)(_model)
    app.get("/v1/steering", responses=STEERING_RESPONSES, **route_options)(_steering)
    app.put("/v1/steering", responses=SET_STEERING_RESPONSES, **json_route_options)(_set_steering)
    app.post("/v1/chat/completions", responses=ANSWER_RESPONSES, **json_route_options)(_chat)
    app.post("/v1/completions", responses=ANSWER_RESPONSES, **json_route_options)(_complete)


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
    requests = await _tokenized(service, service.chat_requests, body, steering)
    builder = _response_builder(service, True, steering, requests, body)
    return await _answer(request, body, builder)


async def _complete(body: CompletionBody, request: Request, service: Served) -> Response:
    service.require_model(body.model)
    steering = service.steering(body.steering)
    requests = await _tokenized(service, service.completion_requests, body, steering)
    builder = _response_builder(service, False, steering, requests, body)
    return await _answer(request, body, builder)


async def _tokenized(
    service: Service, tokenize: Callable[..., list[SequenceRequest]], *arguments: Any
) -> list[SequenceRequest]:
    """Call `tokenize` in the pool: templates and tokenizers can take long over a long prompt."""
    return await asyncio.get_running_loop().run_in_executor(service.tokenizer_pool, tokenize, *arguments)


def _response_builder(
    service: Service, is_chat: bool, steering: Any, requests: list[SequenceRequest], body: GenerationBody
) -> ResponseBuilder:
    fingerprint = f"fp_{service.model.info.fingerprint[:12]}"
    prompt_tokens = sum(len(request.tokens) for request in requests[:: body.n])
    return ResponseBuilder(is_chat, service.name, fingerprint, steering, requests, prompt_tokens)


async def _answer(request: Request, body: GenerationBody, builder: ResponseBuilder) -> Response:
    service, metrics = _service(request), request.app.state.metrics
    stream = service.submit(builder.requests, request.state.client)
    metrics.prompt_tokens.inc(builder.prompt_tokens)
    if body.stream:
        events = _event_stream(stream, builder, body.stream_options.include_usage, metrics)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
    try:
        choices = await _unless_client_leaves(request, stream)
    finally:
        _count_tokens(stream, metrics)
        stream.cancel()
    if choices is None:
        return Response(status_code=_CLIENT_IS_GONE)
    return JSONResponse(builder.whole(choices, stream.n_tokens))


async def _unless_client_leaves(request: Request, stream: ResponseStream) -> list[CollectedChoice] | None:
    """Return the whole choices, or None where nobody waits for them any more."""
    choices: list[CollectedChoice] | None = None
    failure: ApiError | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            choices = await stream.collect()
        except ApiError as error:  # a task group would wrap it
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return choices


async def _event_stream(
    stream: ResponseStream, builder: ResponseBuilder, include_usage: bool, metrics: Metrics
) -> AsyncIterator[str]:
    """Yield server-sent events. Starlette closes this iterator where the client leaves."""
    started, waits = time.monotonic(), True
    try:
        if builder.is_chat:
            for index in range(len(builder.requests)):
                yield _event(builder.opening(index))
        async with aclosing(stream.events()) as events:
            async for index, event in events:
                if waits:
                    metrics.first_token_seconds.observe(time.monotonic() - started)
                    waits = False
                yield _event(builder.chunk(index, event))
        if include_usage:
            yield _event(builder.usage_chunk(stream.n_tokens))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        _count_tokens(stream, metrics)
        stream.cancel()


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _count_tokens(stream: ResponseStream, metrics: Metrics) -> None:
    metrics.generated_tokens.inc(stream.n_tokens)
    if not stream.is_complete:
        metrics.cancelled.inc()
