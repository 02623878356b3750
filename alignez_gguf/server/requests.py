"""The bodies of requests, as OpenAI's API has them, and the field `steering` that it does not have.

A parameter that would change the answer and is not supported is refused, unless its value says that nothing
is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    }
)
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Parameters of OpenAI's API, and the values that ask for nothing."""

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


def _describe_tolerated(schema: dict[str, Any]) -> None:
    """Add the parameters that are taken without an effect to the description of a body."""
    schema["properties"] |= {name: {} for name in sorted(_WITHOUT_EFFECT)}
    schema["properties"] |= {name: {"enum": [None, *neutral]} for name, neutral in _UNSUPPORTED.items()}


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it, where 0 is not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


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


StopString = Annotated[str, Field(min_length=1)]


class GenerationBody(_Body):
    """What both kinds of request share."""

    model_config = ConfigDict(json_schema_extra=_describe_tolerated)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = 1.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = 1
    stop: StopString | Annotated[list[StopString], Field(max_length=_MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-_SEED_LIMIT, lt=_SEED_LIMIT)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    steering: SteeringFields = SteeringFields()

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_supported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in _UNSUPPORTED.items():
            if body.get(name) is not None and not any(_same(body[name], one) for one in neutral):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return {
            name: value for name, value in body.items() if name not in _WITHOUT_EFFECT | _UNSUPPORTED.keys()
        }

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ContentPart(_Body):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation; fields that other servers put into their answers are ignored."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def n_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_SOME = Field(min_length=1)
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], _SOME]


class CompletionBody(GenerationBody):
    prompt: Text | Annotated[list[Text], _SOME] | Tokens | Annotated[list[Tokens], _SOME]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """A list, whatever form they were given in."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or bool(prompt and isinstance(prompt[0], int))
        return [prompt] if one else prompt
