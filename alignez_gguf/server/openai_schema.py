"""The bodies of requests, as OpenAI's API has them, and the field `steering` that it does not have.

A parameter that would change the answer and is not supported is refused, unless its value says that nothing
is wanted. A parameter that is null asks for nothing, and is as if it were left out.
"""

from __future__ import annotations

from collections.abc import Mapping
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

_SEED_LIMIT = 2**63
_MAX_CHOICES = 128
_MAX_STOPS = 16
"""Each of them is looked for behind every token."""

_SCOPE_PATTERN = "^(generation|all|first:[1-9][0-9]{0,8})$"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Strength = Annotated[Finite, Field(ge=0, le=100)]


Scope = Annotated[
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
            if name in given and not any(_same(given[name], one) for one in neutral):
                raise _refused(name, "is not supported by this server; leave it out")
        without_effect = cls.without_effect | cls.unsupported.keys()
        return {name: value for name, value in given.items() if name not in without_effect}


class SteeringFields(_Body):
    """How one answer is steered; what is left out is the server's default."""

    strength: Strength | None = None
    scope: Scope | None = None
    control: str | None = None
    divergence: bool = False
    """Report KL(P_base || P_steered) of every token."""


class SteeringDefaults(_Body):
    """What `PUT /v1/steering` takes."""

    strength: Strength | None = None
    scope: Scope | None = None
    control: str | None = None


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


_StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    _StopString | Annotated[list[_StopString], Field(max_length=_MAX_STOPS)],
    _one_of(f"a string or a list of at most {_MAX_STOPS} strings, none of them empty"),
]


class GenerationBody(_Body):
    """What both kinds of request share."""

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


class Message(_Body):
    """One message of a conversation; what servers tell of how they came to an answer is ignored."""

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
    messages: Annotated[list[Message], Field(min_length=1)]
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
        """A list, whatever form they were given in."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or bool(prompt and isinstance(prompt[0], int))
        return [prompt] if one else prompt
