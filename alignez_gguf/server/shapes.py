"""The bodies of answers, whole and in chunks, as OpenAI's API has them.

Where it was asked for, a choice has a field `divergence`: KL(P_base || P_steered) of each token, in nat.
Every body has `steering`, which says how steering was asked for, and where the control has a gate, a finished
choice has `steered`: whether the gate opened for it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alignez_gguf.engines.base import Completion
from alignez_gguf.engines.llama.batching import SequenceRequest, TextDelta, TokenReport
from alignez_gguf.server.controls import SteeringChoice
from alignez_gguf.server.reply import Choice


@dataclass(frozen=True)
class Frame:
    """What all bodies of one request have in common."""

    is_chat: bool
    model: str
    fingerprint: str
    steering: SteeringChoice
    requests: Sequence[SequenceRequest]
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    identifier: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, choices: Sequence[Choice], n_tokens: int) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            **self._head(kind),
            "choices": [self._whole_choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self.usage(n_tokens),
        }

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice of a chat."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def chunk(self, index: int, event: TextDelta | Completion) -> dict[str, Any]:
        """The chunk of one event."""
        delta = event if isinstance(event, TextDelta) else TextDelta("")
        text: dict[str, Any] = {"text": delta.text}
        if self.is_chat:
            text = {"delta": {"content": delta.text} if delta.text else {}}
        text |= self._reports(index, delta.tokens)
        if isinstance(event, TextDelta):
            return self._chunk(index, text, None)
        return self._chunk(index, text | self._decision(index, event), event.finish_reason)

    def usage_chunk(self, n_tokens: int) -> dict[str, Any]:
        """The last chunk, where `stream_options.include_usage` asks for it."""
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

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text: dict[str, Any] = {"text": choice.text}
        if self.is_chat:
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        reason, more = None, self._reports(index, choice.tokens)
        if choice.end is not None:
            reason, more = choice.end.finish_reason, more | self._decision(index, choice.end)
        return {"index": index, "logprobs": None, **text, **more, "finish_reason": reason}

    def _reports(self, index: int, tokens: Sequence[TokenReport]) -> dict[str, Any]:
        """The fields of a choice about its tokens; none where none were asked for."""
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
        """The field of a choice that says what a gate has decided, if there is one."""
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
