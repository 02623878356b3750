"""The OpenAPI description of a server: what FastAPI sees in the routes, and what only this server knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from alignez_gguf import __version__
from alignez_gguf.server.service import Service

Schema = dict[str, Any]
Responses = dict[int | str, Schema]

_REASONS = {
    400: "The request cannot be answered; the message names the field and the mend.",
    401: "The API key is wrong or missing.",
    403: "The request names another host than this machine.",
    404: "No such model or path.",
    408: "The request arrived too slowly.",
    413: "The body is too long.",
    415: "The body is not said to be JSON.",
    429: "Too many requests wait.",
    431: "The head of the request is too long.",
    500: "The server met an error of its own.",
    503: "The model could not go on, or the server is shutting down.",
}
_OF_EVERY_ROUTE = (400, 401, 403, 408, 413, 431, 500)
_OF_A_BODY = (415,)
_OF_AN_ANSWER = (404, 415, 429, 503)

_NULLABLE_TEXT: Schema = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}
_STEERING = {
    "type": "object",
    "required": ["control", "strength", "scope"],
    "properties": {
        "control": _NULLABLE_TEXT,
        "strength": {"type": "number", "minimum": 0},
        "scope": {"type": "string"},
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "additionalProperties": {"type": "integer", "minimum": 0},
}
_CHOICE = {
    "type": "object",
    "required": ["index", "finish_reason", "logprobs"],
    "properties": {
        "index": {"type": "integer"},
        "finish_reason": {"enum": ["stop", "length"]},
        "steered": {"type": "boolean"},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage", "steering"],
    "properties": {
        "choices": {"type": "array", "minItems": 1, "items": _CHOICE},
        "usage": _USAGE,
        "steering": _STEERING,
    },
}
_MODEL = {"type": "object", "required": ["id", "object", "context_length", "controls"]}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"data": {"type": "array", "items": _MODEL}},
}
_DEFAULTS = {**_STEERING, "required": [*_STEERING["required"], "controls"]}
_HEALTH = {"type": "object", "required": ["status"], "properties": {"status": {"enum": ["ok", "stopped"]}}}


def _failures(*statuses: int) -> Responses:
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _REASONS[status], "content": content} for status in sorted(statuses)}


def _json(schema: Mapping[str, Any], **more: Schema) -> Responses:
    return {200: {"description": "Success.", "content": {"application/json": {"schema": schema}, **more}}}


HEALTH_RESPONSES: Responses = _json(_HEALTH) | {
    503: {"description": "Not able to answer.", "content": {"application/json": {"schema": _HEALTH}}}
}
METRICS_RESPONSES: Responses = {
    200: {
        "description": "Counters, for Prometheus.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}
MODELS_RESPONSES = _json(_MODELS)
MODEL_RESPONSES = _json(_MODEL) | _failures(404)
STEERING_RESPONSES = _json(_DEFAULTS)
SET_STEERING_RESPONSES = STEERING_RESPONSES | _failures(*_OF_A_BODY)
ANSWER_RESPONSES = _json(_ANSWER, **{"text/event-stream": {}}) | _failures(*_OF_AN_ANSWER)


def openapi_document(
    app: FastAPI, service: Service, *, needs_key: bool, open_paths: frozenset[str]
) -> Schema:
    """The OpenAPI document. It names this server's model, controls and limits.

    Args:
        needs_key: whether clients have to send an API key.
        open_paths: those that need none.
    """
    document: Schema = get_openapi(
        title="alignez-gguf",
        version=__version__,
        summary="A steered language model behind OpenAI's API.",
        routes=app.routes,
    )
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here it is a 400
            operation["responses"] |= {
                str(status): answer for status, answer in _failures(*_OF_EVERY_ROUTE).items()
            }
            if needs_key and path not in open_paths:
                operation["security"] = [{"key": []}]
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    _name_choices(document, service)
    return document


def _name_choices(document: Schema, service: Service) -> None:
    """Say which names and numbers this server takes."""
    model = {"type": "string", "enum": [service.name]}
    (named,) = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
    named["schema"] = model
    schemas = document["components"]["schemas"]
    for kind in schemas["CompletionBody"]["properties"]["prompt"]["anyOf"]:
        while kind["type"] == "array":
            kind = kind["items"]
        if kind["type"] == "integer":
            kind["maximum"] = service.model.n_vocab - 1
    limits = {"maximum": service.limits.max_tokens}
    for body in ("ChatBody", "CompletionBody"):
        fields = schemas[body]["properties"]
        fields["model"] = model
        for name in {"max_tokens", "max_completion_tokens"} & fields.keys():
            _number(fields[name]).update(limits)
    for body in ("SteeringFields", "SteeringDefaults"):
        fields = schemas[body]["properties"]
        fields["control"] = {"enum": [None, *service.controls.files]}
        if not service.controls.files:
            _number(fields["strength"]).update({"maximum": 0})


def _number(field: Schema) -> Schema:
    """The part of "a number or null" that is the number."""
    found: Schema = next(kind for kind in field["anyOf"] if kind["type"] != "null")
    return found
