"""Bodies of requests, held against the types of OpenAI's own client: what is taken, and what is refused."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from tests.server.client import Server
from tests.server.conftest import Serve

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Sure."},
    {"role": "user", "content": "go on"},
]
CHAT: dict[str, Any] = {"model": "demo", "messages": TALK, "max_tokens": 4, "seed": 1}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "Human: hi", "max_tokens": 4, "seed": 1}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}

PARAMETERS = {
    "/v1/chat/completions": set(chat_create_params.CompletionCreateParamsNonStreaming.__annotations__)
    | set(chat_create_params.CompletionCreateParamsBase.__annotations__),
    "/v1/completions": set(completion_create_params.CompletionCreateParamsNonStreaming.__annotations__)
    | set(completion_create_params.CompletionCreateParamsBase.__annotations__),
}
REQUIRED = {"model", "messages", "prompt"}

WANTED: dict[str, Any] = {
    "audio": {"voice": "ash", "format": "wav"},
    "best_of": 2,
    "echo": True,
    "frequency_penalty": 0.5,
    "function_call": {"name": "look"},
    "functions": [{"name": "look"}],
    "logit_bias": {"3": 1},
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": 0.5,
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "suffix": "x",
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "look"}}],
    "verbosity": "low",
    "web_search_options": {},
}
"""Parameters that would change the answer, with a value that asks for that."""
TAKEN: dict[str, Any] = {
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "prompt_cache_key": "x",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "x",
    "service_tier": "auto",
    "store": True,
    "user": "x",
}
"""Parameters that change nothing about the answer."""
SUPPORTED = {
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_logprobs",
    "top_p",
}


def ask(server: Server, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={**BODIES[path], **fields}, timeout=60)


def said(response: httpx.Response) -> Any:
    """The answer itself, without what differs from one to the next."""
    assert response.status_code == 200, response.text
    return response.json()["choices"], response.json()["usage"], response.json()["steering"]


def refused(response: httpx.Response) -> tuple[str, str]:
    """The field at fault, and the message."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_every_parameter_of_openais_client_is_known_here(path: str) -> None:
    assert PARAMETERS[path] - REQUIRED <= WANTED.keys() | TAKEN.keys() | SUPPORTED


@pytest.mark.parametrize("path", BODIES)
def test_null_asks_for_nothing(server: Server, path: str) -> None:
    plain = said(ask(server, path))
    for name in (PARAMETERS[path] | WANTED.keys() | TAKEN.keys()) - REQUIRED - BODIES[path].keys():
        assert said(ask(server, path, **{name: None})) == plain, name
    nothing = dict.fromkeys((*SUPPORTED - BODIES[path].keys(), "steering", "top_k"))
    assert said(ask(server, path, **nothing)) == plain
    for steering in ({}, dict.fromkeys(("strength", "scope", "control", "divergence", "more"))):
        assert said(ask(server, path, steering=steering)) == plain
    options = dict.fromkeys(ChatCompletionStreamOptionsParam.__annotations__)
    streamed = ask(server, path, stream=True, stream_options=options)
    assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", BODIES)
def test_null_of_what_is_required_is_as_missing(server: Server, path: str) -> None:
    for name in REQUIRED & BODIES[path].keys():
        assert refused(ask(server, path, **{name: None})) == (name, f"{name}: Field required")


def test_null_is_no_default_of_the_server(serve: Serve) -> None:
    with serve() as server:
        before = httpx.get(f"{server.url}/v1/steering").json()
        null = dict.fromkeys(("strength", "scope", "control"))
        assert httpx.put(f"{server.url}/v1/steering", json=null).json() == before


@pytest.mark.parametrize("path", BODIES)
def test_what_would_change_the_answer_is_refused_by_name(server: Server, path: str) -> None:
    for name, value in WANTED.items():
        param, message = refused(ask(server, path, **{name: value}))
        assert param == name
        assert message.startswith(f"{name}: ")


@pytest.mark.parametrize("path", BODIES)
def test_what_changes_nothing_is_taken(server: Server, path: str) -> None:
    neutral = {
        "best_of": 1,
        "echo": False,
        "frequency_penalty": 0,
        "function_call": "none",
        "functions": [],
        "logit_bias": {},
        "modalities": ["text"],
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
        "suffix": "",
        "tool_choice": "auto",
        "tools": [],
        "verbosity": "medium",
    }
    assert said(ask(server, path, **TAKEN, **neutral)) == said(ask(server, path))
    for retention in ("in_memory", "24h", None):
        assert ask(server, path, prompt_cache_retention=retention).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("name", "shown"), [("top_k", "top_k"), ("top-k", "'top-k'"), ("x\ny", "'x\\ny'")])
def test_unknown_parameter_is_refused_by_name(server: Server, path: str, name: str, shown: str) -> None:
    param, message = refused(ask(server, path, **{name: 4}))
    assert param == shown
    assert message == f"{shown}: this server does not know it; leave it out"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_calls", [{"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}]),
        ("function_call", {"name": "look", "arguments": "{}"}),
        ("audio", {"id": "x"}),
        ("refusal", "I will not."),
        ("name", "somebody"),
        ("tool_call_id", "x"),
    ],
)
@pytest.mark.parametrize("content", ["Sure.", None])
def test_field_of_a_message_that_would_change_the_answer_is_refused_by_name(
    server: Server, name: str, value: object, content: str | None
) -> None:
    message = {"role": "assistant", "content": content, name: value}
    param, text = refused(ask(server, "/v1/chat/completions", messages=[TALK[0], message, TALK[2]]))
    assert param == f"messages[1].{name}"
    assert name in text


def test_unknown_field_of_a_message_is_refused_by_name(server: Server) -> None:
    param, _ = refused(ask(server, "/v1/chat/completions", messages=[{**TALK[0], "images": ["x"]}]))
    assert param == "messages[0].images"


def test_conversation_that_does_not_fit_the_model_is_told_where(server: Server) -> None:
    param, text = refused(ask(server, "/v1/chat/completions", messages=TALK[:2]))
    assert param == "messages"
    assert "has to begin and to end with a message of the user" in text


@pytest.mark.parametrize(
    ("path", "param"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")]
)
@pytest.mark.parametrize("n_words", [300, 10_000])
@pytest.mark.parametrize("more", [{}, {"max_tokens": None}])
def test_text_that_is_too_long_is_told_where(
    server: Server, path: str, param: str, n_words: int, more: dict[str, None]
) -> None:
    text = "hi " * n_words
    given: Any = text if param == "prompt" else [{"role": "user", "content": text}]
    assert refused(ask(server, path, **{param: given}, **more))[0] == param


def test_messages_as_the_official_client_gives_them_back_are_taken(server: Server) -> None:
    plain = said(ask(server, "/v1/chat/completions"))
    fields = ChatCompletionMessage(role="assistant", content="Sure.").model_dump()
    assert fields["tool_calls"] is None
    assert "refusal" in fields
    for more in ({}, {"tool_calls": []}, {"annotations": [], "reasoning_content": "Hm."}):
        messages = [TALK[0], {**fields, **more}, TALK[2]]
        assert said(ask(server, "/v1/chat/completions", messages=messages)) == plain
    null = dict.fromkeys(("name", "tool_call_id", "prompt_cache_breakpoint"))
    parts = [
        {**TALK[0], **null},
        fields,
        {"role": "user", "content": [{"type": "text", "text": "go on", **null}]},
    ]
    assert said(ask(server, "/v1/chat/completions", messages=parts)) == plain


STOPS = "should be a string or a list of at most 16 strings, none of them empty"
PROMPTS = (
    "should be a string, a list of strings, a list of tokens, or a list of such lists, none of them empty"
)
CONTENT = "should be a string or a list of parts"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"stop": 5}, "stop", STOPS),
        ({"stop": ["x"] * 17}, "stop", STOPS),
        ({"stop": ["x", 1]}, "stop", STOPS),
        ({"stop": ["x", ""]}, "stop", STOPS),
        ({"stop": ""}, "stop", STOPS),
        ({"stop": {"x": 1}}, "stop", STOPS),
        ({"prompt": 5}, "prompt", PROMPTS),
        ({"prompt": ["x", 1]}, "prompt", PROMPTS),
        ({"prompt": [1, -1]}, "prompt", PROMPTS),
        ({"prompt": [[1], []]}, "prompt", PROMPTS),
        ({"prompt": ["x", None]}, "prompt", PROMPTS),
        ({"prompt": [1.5]}, "prompt", PROMPTS),
    ],
)
def test_form_that_is_none_of_several_is_told_all_of_them(
    server: Server, fields: dict[str, object], param: str, message: str
) -> None:
    assert refused(ask(server, "/v1/completions", **fields)) == (param, f"{param}: {message}")


@pytest.mark.parametrize(
    ("content", "param", "message"),
    [
        (5, "messages[0].content", CONTENT),
        ({"type": "text", "text": "x"}, "messages[0].content", CONTENT),
        (["x"], "messages[0].content[0]", "Input should be a valid dictionary"),
        ([{"type": "text"}], "messages[0].content[0].text", "Field required"),
        ([{"type": "text", "text": 5}], "messages[0].content[0].text", "Input should be a valid string"),
        ([{"type": "text", "text": "x", "more": 1}], "messages[0].content[0].more", "this server does not"),
        (
            [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}],
            "messages[0].content[1].type",
            "Input should be 'text'",
        ),
        ([{"type": "refusal", "refusal": "no"}], "messages[0].content[0].type", "Input should be 'text'"),
    ],
)
def test_content_that_is_no_text_is_told_where(
    server: Server, content: object, param: str, message: str
) -> None:
    found, text = refused(
        ask(server, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
    )
    assert found == param
    assert text.startswith(f"{param}: {message}")


def test_top_logprobs_need_logprobs(server: Server) -> None:
    for logprobs in (False, None):
        response = ask(server, "/v1/chat/completions", logprobs=logprobs, top_logprobs=3)
        assert refused(response)[0] == "top_logprobs"
        assert said(ask(server, "/v1/chat/completions", logprobs=logprobs, top_logprobs=0))
    (choice,), *_ = said(ask(server, "/v1/chat/completions", logprobs=True, top_logprobs=3))
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 3
