"""The bodies of requests and responses, as OpenAI's API has them, and the fields that it does not have.

A request has a field `steering`. A parameter that would change the answer and is not supported is refused,
unless its value says that nothing is wanted. A null parameter is as if it were left out.

Every response has `steering`, which says how steering was requested. A choice has `divergence` where that is
wanted: KL(P_base || P_steered) of each token, in nat. Where the control has a gate, a finished choice has
`steered`: whether the gate opened for it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from alignez_gguf.engines.base import Completion
from alignez_gguf.engines.llama.batching import SequenceRequest, TextDelta, TokenReport
from alignez_gguf.server.controls import SteeringChoice

_SEED_LIMIT = 2**63
_MAX_CHOICES = 128
_MAX_STOPS = 16
"""The most stop strings; the server searches for each of them behind every token."""

_SCOPE_PATTERN = "^(generation|all|first:[1-9][0-9]{0,8})$"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Strength = Annotated[Finite, Field(ge=0, le=100)]

ScopeName = Annotated[
    str, Field(json_schema_extra={"pattern": _SCOPE_PATTERN, "examples": ["generation", "all", "first:8"]})
]


def _refused(name: str, message: str) -> PydanticCustomError:
    """The error that a body's field `name` is at fault; only the whole body can tell so."""
    return PydanticCustomError("refused_field", message, {"name": name})


def _one_of(forms: str) -> WrapValidator:
    """A union says all its forms where none fits, and not what is wrong with the first one alone."""

    def check(value: Any, check_forms: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check_forms(value)
        except ValidationError as error:
            raise PydanticCustomError("no_form", f"should be {forms}") from error

    return WrapValidator(check)


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it, where 0 is not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _describe(schema: dict[str, Any], body: type[_Body]) -> None:
    """Describe what a body takes beside its fields, and that it takes null for what may be left out."""
    fields = schema["properties"]
    for name in fields.keys() - set(schema.get("required", ())):
        kinds = fields[name].get("anyOf", [fields[name]])
        if {"type": "null"} not in kinds:
            fields[name] = {"anyOf": [*kinds, {"type": "null"}]}
    fields |= {name: {} for name in sorted(body.without_effect)}
    fields |= {name: {"enum": [None, *neutral]} for name, neutral in body.unsupported.items()}
    schema["additionalProperties"] = {"type": "null"}


class _Body(BaseModel):
    """A JSON object of which every field is known here.

    Attributes:
        without_effect: fields that may have any value, since the answer does not depend on them.
        unsupported: fields that it would depend on, and the values of them that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_describe)

    without_effect: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_supported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None}
        for name, neutral in cls.unsupported.items():
            if name in given and not any(_same(given[name], value) for value in neutral):
                raise _refused(name, "is not supported by this server; leave it out")
        without_effect = cls.without_effect | cls.unsupported.keys()
        return {name: value for name, value in given.items() if name not in without_effect}


class SteeringDefaults(_Body):
    """The body of `PUT /v1/steering`."""

    strength: Strength | None = None
    scope: ScopeName | None = None
    control: str | None = None


class SteeringFields(SteeringDefaults):
    """How one answer is steered; a field that is left out takes the server's default."""

    divergence: bool = False
    """Report KL(P_base || P_steered) of every token."""


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


_StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    _StopString | Annotated[list[_StopString], Field(max_length=_MAX_STOPS)],
    _one_of(f"a string or a list of at most {_MAX_STOPS} strings, none of them empty"),
]


class GenerationBody(_Body):
    """The fields that both kinds of request share."""

    without_effect = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "parallel_tool_calls",
        }
    )
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "presence_penalty": (0,),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] = 1
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-_SEED_LIMIT, lt=_SEED_LIMIT)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    steering: SteeringFields = SteeringFields()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ContentPart(_Body):
    without_effect = frozenset({"prompt_cache_breakpoint"})

    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("no_form", "should be a string or a list of parts of the type 'text'")
    return content


def _or_text(schema: dict[str, Any]) -> None:
    """Describe content as it is before `_as_parts`."""
    parts = {key: schema.pop(key) for key in ("type", "items")}
    schema["anyOf"] = [{"type": "string"}, parts]


class ChatMessage(_Body):
    """One message of a conversation; a reasoning text that comes with it is ignored."""

    without_effect = frozenset({"annotations", "reasoning", "reasoning_content", "reasoning_details"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": (),
        "name": (),
        "refusal": (),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart], BeforeValidator(_as_parts), Field(json_schema_extra=_or_text)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _top_logprobs_only_beside_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise _refused("top_logprobs", "needs logprobs to be true; set that, or leave this out")
        return self

    @property
    def n_alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


_SOME = Field(min_length=1)
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], _SOME]
Prompt = Annotated[
    Text | Annotated[list[Text], _SOME] | Tokens | Annotated[list[Tokens], _SOME],
    _one_of("a string, a list of strings, a list of tokens, or a list of such lists, none of them empty"),
]


class CompletionBody(GenerationBody):
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, whatever form they were given in."""
        prompt: Any = self.prompt
        is_single = isinstance(prompt, str) or bool(prompt and isinstance(prompt[0], int))
        return [prompt] if is_single else prompt


@dataclass
class CollectedChoice:
    """One choice of a response, as it stands once all its events were added."""

    text: str = ""
    tokens: list[TokenReport] = field(default_factory=list)
    end: Completion | None = None

    def add(self, event: TextDelta | Completion) -> None:
        if isinstance(event, Completion):
            self.end = event
        else:
            self.text += event.text
            self.tokens += event.tokens


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the bodies of the response to one request, whole or in chunks.

    Attributes:
        requests: one for each choice.
        prompt_tokens: the number of tokens of all prompts together.
        created: seconds since the epoch.
    """

    is_chat: bool
    model: str
    fingerprint: str
    steering: SteeringChoice
    requests: Sequence[SequenceRequest]
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    identifier: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, choices: Sequence[CollectedChoice], n_tokens: int) -> dict[str, Any]:
        """Return the body of a response that is not streamed; `n_tokens` were generated."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            **self._head(kind),
            "choices": [self._whole_choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self.usage(n_tokens),
        }

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first chunk of a choice of a chat."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def chunk(self, index: int, event: TextDelta | Completion) -> dict[str, Any]:
        """Return the chunk of one event."""
        delta = event if isinstance(event, TextDelta) else TextDelta("")
        text: dict[str, Any] = {"text": delta.text}
        if self.is_chat:
            text = {"delta": {"content": delta.text} if delta.text else {}}
        text |= self._reports(index, delta.tokens)
        if isinstance(event, TextDelta):
            return self._chunk(index, text, None)
        return self._chunk(index, text | self._decision(index, event), event.finish_reason)

    def usage_chunk(self, n_tokens: int) -> dict[str, Any]:
        """Return the last chunk, where `stream_options.include_usage` asks for it."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": self.usage(n_tokens)}

    def usage(self, n_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": n_tokens,
            "total_tokens": self.prompt_tokens + n_tokens,
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.identifier}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "steering": self.steering.document(),
        }

    def _chunk(self, index: int, fields: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **fields, "finish_reason": reason}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _whole_choice(self, index: int, choice: CollectedChoice) -> dict[str, Any]:
        text: dict[str, Any] = {"text": choice.text}
        if self.is_chat:
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        reason, more = None, self._reports(index, choice.tokens)
        if choice.end is not None:
            reason, more = choice.end.finish_reason, more | self._decision(index, choice.end)
        return {"index": index, "logprobs": None, **text, **more, "finish_reason": reason}

    def _reports(self, index: int, tokens: Sequence[TokenReport]) -> dict[str, Any]:
        """Return the fields of a choice about its tokens; none where none were requested."""
        request, fields = self.requests[index], dict[str, Any]()
        if request.n_alternatives is not None and tokens:
            fields["logprobs"] = _chat_logprobs(tokens) if self.is_chat else _completion_logprobs(tokens)
        if request.divergence and tokens:
            fields["divergence"] = [
                {"token": _text(token.data), "text_offset": token.offset, "kl": token.divergence}
                for token in tokens
            ]
        return fields

    def _decision(self, index: int, end: Completion) -> dict[str, bool]:
        """Return the field of a choice that says what a gate has decided, if there is one."""
        return {} if self.requests[index].gate is None else {"steered": end.steered}


def _chat_logprobs(tokens: Sequence[TokenReport]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_entry(token.data, token.logprob),
                "top_logprobs": [_entry(data, logprob) for data, logprob in token.alternatives],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _completion_logprobs(tokens: Sequence[TokenReport]) -> dict[str, Any]:
    return {
        "tokens": [_text(token.data) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_text(data): logprob for data, logprob in token.alternatives} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _entry(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
