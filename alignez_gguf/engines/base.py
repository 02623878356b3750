"""The protocols of engines, and the data that they take and give. Light enough to be imported anywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from alignez_gguf.readout import Hook, Readout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from alignez_gguf.control.model_info import ModelInfo

DEFAULT_N_PARALLEL = 64
"""Sequences that are decoded in parallel by default, where the KV cache has room for them."""


@dataclass(frozen=True)
class Sampling:
    """The settings by which tokens are drawn.

    Attributes:
        max_tokens: the most tokens that are generated.
        temperature: 0 takes the most likely token.
        top_p: only the most likely tokens that together have this probability can be drawn.
        stop: strings that end the text; they are not part of it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, but is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and not above 1, but is {self.top_p}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")


@dataclass(frozen=True)
class GenerationRequest:
    """One text to be generated: it depends on these fields and the sampling alone, not on other requests.

    Attributes:
        prompt: the text to go on from; special tokens in it are parsed.
        seed: the seed of the draws.
        strength: the strength of the engine's edit, if it has one.
        keep_prompt: the prompt will come again, so that an engine may cache its KV state.
    """

    prompt: str
    seed: int = 0
    strength: float = 0.0
    keep_prompt: bool = False


@dataclass(frozen=True)
class Completion:
    """A text that a model has generated.

    Attributes:
        text: the text without the prompt, and without the stop string that ended it.
        n_tokens: the number of generated tokens, without the one that ends a text.
        finish_reason: "stop" at a stop string or where the model ended the text, "length" at `max_tokens`.
        steered: whether an edit acted on it: one was asked for, and no gate stayed closed.
    """

    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]
    steered: bool = False


@dataclass(frozen=True)
class Passage:
    """A prompt and, directly behind it, a response to it, which may be empty."""

    prompt: str
    response: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.response


class Generator(Protocol):
    """Generates texts; it may be a model on another machine."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete all requests; each is yielded with its index as soon as it is finished.

        `on_text(index, piece)` is called with each new piece of text; the pieces add up to the completion.

        Raises:
            QueryError: a prompt is empty, or does not fit into the context together with `max_tokens`.
        """
        ...


class Engine(Generator, Protocol):
    """Runs one model, and reads its hidden states and log-probabilities.

    Values are computed as an iterator is advanced, so that several iterators over texts with the same
    prefixes may take turns.
    """

    @property
    def info(self) -> ModelInfo: ...

    @property
    def hooks(self) -> Collection[Hook]:
        """The hidden states that can be read of every layer of this architecture."""
        ...

    def activations(
        self, passages: Sequence[Passage], readouts: Sequence[Readout]
    ) -> Iterator[NDArray[np.float16]]:
        """Yield the hidden states of each passage, [n_readouts, n_layer, n_embd], in order.

        A passage is computed once for all readouts, and a readout does not depend on the others. The last
        token is that of the whole text; the mean is taken over the tokens behind those of the prompt alone,
        or over the last token where there are none.

        Raises:
            QueryError: a text is empty or longer than the context.
            ModelFileError: the engine cannot tell what the hook is in this architecture.
        """
        ...

    def response_logprobs(
        self, passages: Sequence[Passage], *, max_tokens: int | None = None
    ) -> Iterator[float]:
        """Yield log P(response | prompt) in nat, summed over its first `max_tokens` tokens, in order.

        Raises:
            QueryError: a text is empty, has no response, or is longer than the context.
        """
        ...

    def next_token_logprobs(self, prompts: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        """Yield the log-probabilities of the token after each prompt, [n_vocab], in nat, in order.

        Raises:
            QueryError: a prompt is empty or longer than the context.
        """
        ...
