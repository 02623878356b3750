"""The model behind the HTTP routes: turns bodies of requests into sequences, and collects their events."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

from alignez_gguf.closing import Closing
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.engines.base import Completion, Sampling
from alignez_gguf.engines.llama.batching import (
    Batch,
    Event,
    Failed,
    QueuedRequest,
    SequenceRequest,
    TextDelta,
)
from alignez_gguf.engines.llama.sequences import EXACT_CHUNK_TOKENS
from alignez_gguf.errors import AlignezError, QueryError, SteeringError
from alignez_gguf.prompts.chat_template import ChatTemplate, FramingChoice, Message, other_framing
from alignez_gguf.runtime.model import Model
from alignez_gguf.server.controls import Controls, SteeringChoice
from alignez_gguf.server.errors import ApiError
from alignez_gguf.server.openai_schema import (
    ChatBody,
    CollectedChoice,
    CompletionBody,
    GenerationBody,
    SteeringFields,
)
from alignez_gguf.server.scheduler import QueueFullError, Scheduler

_DEFAULT_CONTEXT = 4096
_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_CHARACTERS_PER_TOKEN = 16
"""No text has more on average; the time of some tokenizers grows with the square of the length."""
_CACHE_BYTES = 4 << 30
"""The most bytes of the KV cache of all sequences together."""
_PREFILL_TOKENS = 4 * EXACT_CHUNK_TOKENS
"""Tokens of prompts between two steps: new requests get in, and running ones never wait long."""

_MOST_UNREAD = 8192
"""The most events that wait for a client which does not read; its answers end beyond them."""
_TOKENIZER_THREADS = 2
_STACK_BYTES_PER_CHARACTER = 1024
"""A thread that tokenizes needs 330, as was measured. Stack that is not used takes no memory."""
_STACK_PAGE = 64 << 10
_SPARE_STACK_BYTES = 1 << 20

_ROLES = {"developer": "system"}


@dataclass(frozen=True)
class RequestLimits:
    """The most that one request may ask for, and how many requests may wait.

    Attributes:
        max_tokens: tokens of an answer; also the number for a chat that does not say.
        max_prompt_tokens: tokens of a prompt; `None` for as many as the context holds.
        queue: the most requests that wait.
        body_bytes: bytes of the body of a request.
    """

    max_tokens: int = 1024
    max_prompt_tokens: int | None = None
    queue: int = 256
    body_bytes: int = 1 << 20


class ResponseStream:
    """The events of all choices of one HTTP request, made and read in one event loop.

    Attributes:
        queued: a request for each choice, to be given to the scheduler.
        n_tokens: how many tokens the finished choices have.
    """

    def __init__(self, requests: Sequence[SequenceRequest]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.queued = [
            QueuedRequest(request, partial(self._listen, index)) for index, request in enumerate(requests)
        ]
        self._n_left = len(requests)
        self.n_tokens = 0

    @property
    def is_complete(self) -> bool:
        return self._n_left == 0

    async def events(self) -> AsyncGenerator[tuple[int, TextDelta | Completion], None]:
        """Yield each event with the index of its choice, until all are finished.

        Raises:
            ApiError: a 503, where the server cannot go on.
        """
        while self._n_left:
            index, event = await self._events.get()
            if isinstance(event, Failed):
                raise ApiError(503, event.message)
            if isinstance(event, Completion):
                self._n_left -= 1
                self.n_tokens += event.n_tokens
            yield index, event

    async def collect(self) -> list[CollectedChoice]:
        """Wait for all events, and return the whole choices."""
        choices = [CollectedChoice() for _ in self.queued]
        async for index, event in self.events():
            choices[index].add(event)
        return choices

    def cancel(self) -> None:
        """Stop the choices that are not finished."""
        for queued in self.queued:
            queued.cancel()

    def _listen(self, index: int, event: Event) -> None:
        # The loop is closed where the server went down before the model did.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, index, event)

    def _put(self, index: int, event: Event) -> None:
        if self._events.qsize() == _MOST_UNREAD:
            self.cancel()
            event = Failed("the answer is not being read; ask for less at once, or read it faster")
        if self._events.qsize() <= _MOST_UNREAD:
            self._events.put_nowait((index, event))


class Service(Closing):
    """A model, its controls, and the thread that answers.

    Args:
        model_path: the GGUF file.
        controls: control files by name; the first is the default.
        strength, scope: the defaults of requests; without a scope, the one that their control was chosen for.
        name: what the API calls the model; default: the name of the file.
        templates: a TOML file with prompt templates.
        framing: whether conversations go through the model's chat template; see `chat_template.templates_of`.
        n_ctx: the longest prompt and answer together; default: 4096, or what the model was trained for.
        n_parallel: the most sequences that are decoded at once; fewer where memory is tight.
        n_threads: default: the number of physical cores.
        n_gpu_layers: -1 for all, if there is a GPU.

    Raises:
        AlignezError: the model or a control file cannot be used.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        controls: Mapping[str, ControlFile],
        *,
        strength: float = 1.0,
        scope: str | None = None,
        name: str | None = None,
        templates: Path | None = None,
        framing: FramingChoice = "auto",
        n_ctx: int | None = None,
        n_parallel: int = 16,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        limits: RequestLimits | None = None,
    ) -> None:
        self.limits = limits or RequestLimits()
        self.controls = Controls(controls, strength, scope)
        self.name = name or Path(model_path).stem
        with ExitStack() as opened:
            self.model = opened.enter_context(Model(model_path, n_gpu_layers=n_gpu_layers))
            self._framing = ChatTemplate.of(self.model, templates, framing)
            used = self._framing.templates.framing
            self.warnings = [
                f"{name}: {warning}"
                for name, control in controls.items()
                if (warning := other_framing(control.framing, used))
            ]
            """Lines for whoever starts the server."""
            self.n_ctx = n_ctx or min(_DEFAULT_CONTEXT, self.model.n_ctx_train)
            room = _CACHE_BYTES // (self.n_ctx * self.model.cache_bytes)
            self._max_characters = min(self.n_ctx * _CHARACTERS_PER_TOKEN, self.limits.body_bytes)
            self.tokenizer_pool = opened.enter_context(tokenizer_pool(self._max_characters))
            """The threads in which `chat_requests` and `completion_requests` have to be called."""
            for control in controls.values():
                control.check_fits(self.model.info)
                if control.gate is not None:
                    control.gate.check_fits(self.model.n_vocab)
            batch = Batch(
                self.model,
                [control.edits for control in controls.values()],
                n_ctx=self.n_ctx,
                n_parallel=max(2, min(n_parallel, room)),
                n_threads=n_threads,
                prefill_tokens=_PREFILL_TOKENS,
            )
            opened.callback(batch.close)
            self._open = opened.pop_all()
        self.scheduler = Scheduler(batch, self.limits.queue)

    def require_model(self, name: str) -> None:
        """Raise a 404 where a request names another model."""
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def steering(self, fields: SteeringFields) -> SteeringChoice:
        """Return how a request is steered. Raises a 400 where it cannot be."""
        try:
            return self.controls.choose(fields.strength, fields.scope, fields.control)
        except SteeringError as error:
            raise ApiError(400, str(error), param="steering") from error

    def chat_requests(self, body: ChatBody, steering: SteeringChoice) -> list[SequenceRequest]:
        """Return a request for each choice of a chat request. Raises a 400."""
        messages = [
            Message(_ROLES.get(message.role, message.role), message.text) for message in body.messages
        ]
        try:
            prompt = self._framing.prompt_of(messages)
        except AlignezError as error:
            raise ApiError(400, str(error), param="messages") from error
        tokens = self._tokens(prompt, "messages")
        stop = (*body.stop_strings, *self._framing.stop)
        self._check_max_tokens(body.max_tokens)
        wanted = body.max_completion_tokens or body.max_tokens
        return self._requests(
            body, steering, [tokens], wanted, self.limits.max_tokens, stop, body.n_alternatives
        )

    def completion_requests(self, body: CompletionBody, steering: SteeringChoice) -> list[SequenceRequest]:
        """Return a request for each choice of each prompt. Raises a 400."""
        prompts = [
            self._tokens(prompt, "prompt") if isinstance(prompt, str) else self._checked_tokens(prompt)
            for prompt in body.prompts
        ]
        if not prompts:
            raise ApiError(400, "there is no prompt; give one", param="prompt")
        return self._requests(
            body, steering, prompts, body.max_tokens, _COMPLETION_TOKENS, body.stop_strings, body.logprobs
        )

    def submit(self, requests: Sequence[SequenceRequest], client: Hashable) -> ResponseStream:
        """Queue requests; called in the event loop that reads the response. Raises a 429."""
        stream = ResponseStream(requests)
        try:
            self.scheduler.submit(stream.queued, client)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="rate_limit_exceeded") from error
        return stream

    def close(self) -> None:
        """End all answers and free everything. Idempotent."""
        self.scheduler.close()
        self._open.close()

    def _requests(
        self,
        body: GenerationBody,
        steering: SteeringChoice,
        prompts: Sequence[tuple[int, ...]],
        wanted: int | None,
        default: int,
        stop: tuple[str, ...],
        n_alternatives: int | None,
    ) -> list[SequenceRequest]:
        n_choices = body.n
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        if n_choices * len(prompts) > self.limits.queue:
            raise ApiError(
                400,
                f"{n_choices * len(prompts)} answers are more than {self.limits.queue}; ask for fewer",
                param="n",
            )
        # llama.cpp's samplers take 32 bits, and OpenAI's seeds have 64.
        seed = secrets.randbits(31) if body.seed is None else body.seed
        gate = self.controls.gate(steering)
        requests = []
        for tokens in prompts:
            sampling = Sampling(
                self._max_tokens(len(tokens), wanted, default, param),
                body.temperature,
                body.top_p,
                stop,
            )
            steered = self.controls.steering(steering, len(tokens))
            requests += [
                SequenceRequest(
                    tokens,
                    sampling,
                    seed + choice,
                    steered,
                    gate,
                    n_alternatives=n_alternatives,
                    divergence=body.steering.divergence,
                )
                for choice in range(n_choices)
            ]
        return requests

    def _max_tokens(self, n_prompt: int, wanted: int | None, default: int, param: str) -> int:
        """Return the most tokens of an answer. Raises a 400 where it cannot have as many as are wanted."""
        limit = self.limits.max_prompt_tokens
        if limit is not None and n_prompt > limit:
            message = f"the prompt has {n_prompt} tokens, more than the {limit} that this server takes"
            raise _too_long(message, param)
        room = self.n_ctx - n_prompt
        if wanted is None:
            if room < 1:
                message = f"the prompt has {n_prompt} tokens, but the context only {self.n_ctx}"
                raise _too_long(message, param)
            return min(default, self.limits.max_tokens, room)
        self._check_max_tokens(wanted)
        if wanted > room:
            raise _too_long(
                f"the prompt has {n_prompt} tokens, which with {wanted} for the answer are more than the "
                f"context of {self.n_ctx}",
                param,
            )
        return wanted

    def _check_max_tokens(self, wanted: int | None) -> None:
        limit = self.limits.max_tokens
        if wanted is not None and wanted > limit:
            message = f"max_tokens is {wanted}, and this server gives at most {limit}"
            raise ApiError(400, message, param="max_tokens")

    def _tokens(self, prompt: str, param: str) -> tuple[int, ...]:
        if len(prompt) > self._max_characters:
            message = f"the prompt has {len(prompt)} characters, and the context {self.n_ctx} tokens"
            raise _too_long(message, param)
        try:
            tokens = tuple(self.model.tokenize(prompt))
        except QueryError as error:
            raise ApiError(400, str(error), param=param) from error
        if not tokens:
            raise ApiError(400, "the prompt is empty; give it text", param=param)
        return tokens

    def _checked_tokens(self, tokens: Sequence[int]) -> tuple[int, ...]:
        if not tokens or not all(0 <= token < self.model.n_vocab for token in tokens):
            raise ApiError(
                400, f"a prompt of tokens needs numbers from 0 to {self.model.n_vocab - 1}", param="prompt"
            )
        return tuple(tokens)


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(400, f"{message}; shorten it", code="context_length_exceeded", param=param)


def tokenizer_pool(n_characters: int) -> ThreadPoolExecutor:
    """Start threads with a stack deep enough to tokenize `n_characters` characters.

    Many vocabularies are split with std::regex (unicode_regex_split_stl in llama.cpp's src/unicode.cpp),
    which calls itself for every character of an unbroken run: on a usual stack, 20,000 digits end the
    process.
    """
    n_bytes = _SPARE_STACK_BYTES + n_characters * _STACK_BYTES_PER_CHARACTER
    barrier = threading.Barrier(_TOKENIZER_THREADS + 1)
    pool = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="alignez-tokenizer")
    usual = threading.stack_size(-(-n_bytes // _STACK_PAGE) * _STACK_PAGE)
    try:
        for _ in range(_TOKENIZER_THREADS):
            pool.submit(barrier.wait)  # a pool makes its threads when they are needed
    finally:
        threading.stack_size(usual)
    barrier.wait()
    return pool
