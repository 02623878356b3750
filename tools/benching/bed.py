"""A context in which runs of decoding and of prefill are timed, under a form of an edit or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benching.forms import Form, NoEdit
from benching.setting import Setting
from benching.timing import alternated, seconds

if TYPE_CHECKING:
    from alignez_gguf.runtime.context import Context
    from alignez_gguf.runtime.model import Model

_TOKEN = 7
"""Which token it is decides nothing about the time."""


@dataclass(frozen=True)
class Sizes:
    """Of the runs.

    Attributes:
        n_before: tokens in the cache before the first decoded one.
        n_prefill: tokens of a prompt, computed in one piece.
        run_seconds: what a run should last.
        least_tokens, most_tokens: decoded in a run, however long that takes.
    """

    n_before: int = 32
    n_prefill: int = 256
    run_seconds: float = 0.8
    least_tokens: int = 8
    most_tokens: int = 160

    def n_decoded(self, per_token: float) -> int:
        """How many tokens a run decodes, given the seconds of one."""
        return min(max(math.ceil(self.run_seconds / per_token), self.least_tokens), self.most_tokens)


class Bed:
    """Times runs on a model, which are as long as those of another bed, or as long as they should last."""

    def __init__(self, model: Model, setting: Setting, sizes: Sizes, like: Bed | None = None) -> None:
        self.sizes = sizes
        self.pairs = setting.pairs
        self.context = open_context(model, setting, sizes)
        self._n_decoded = self._n_prefills = 1
        nothing = NoEdit()
        per_token = [self.decode(nothing) for _ in range(2)][-1]
        per_prefill = [self.prefill(nothing) for _ in range(2)][-1]
        if like is None:
            self._n_decoded = sizes.n_decoded(per_token)
            self._n_prefills = max(1, round(sizes.run_seconds / per_prefill))
        else:
            self._n_decoded, self._n_prefills = like._n_decoded, like._n_prefills

    def decode(self, form: Form) -> float:
        """Seconds of decoding a number of tokens, one at a time, after the same ones."""
        self._fill(self.sizes.n_before)

        def run() -> None:
            for position in range(self.sizes.n_before, self.sizes.n_before + self._n_decoded):
                form.before_token()
                decode(self.context, position)

        return seconds(run)

    def prefill(self, _: Form) -> float:
        """Seconds of computing a prompt a number of times."""
        n_tokens = self.sizes.n_prefill
        self._fill(1)

        def run() -> None:
            for _ in range(self._n_prefills):
                self.context.clear()
                prefill(self.context, n_tokens)

        return seconds(run)

    def compare(self, form: Form, run: Callable[[Form], float]) -> tuple[list[float], list[float]]:
        """Seconds of runs without and with a form."""

        def without() -> float:
            form.off()
            return run(form)

        def with_form() -> float:
            form.on()
            return run(form)

        found = alternated(without, with_form, self.pairs)
        form.off()
        return found

    def _fill(self, n_tokens: int) -> None:
        """Bring so many tokens into the cache; the last one alone, in a graph of its own."""
        self.context.clear()
        if n_tokens > 1:
            prefill(self.context, n_tokens - 1)
        decode(self.context, n_tokens - 1)

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def open_context(model: Model, setting: Setting, sizes: Sizes, n_sequences: int = 1) -> Context:
    """A context with room for every run."""
    from alignez_gguf.runtime.context import Context

    return Context(
        model,
        n_ctx=max(sizes.n_prefill, sizes.n_before + sizes.most_tokens),
        n_sequences=n_sequences,
        n_batch=max(sizes.n_prefill, sizes.n_before),
        n_threads=setting.n_threads,
    )


def prefill(context: Context, n_tokens: int, sequence: int = 0) -> None:
    """Compute the first tokens of a sequence in one piece, and wait for them."""
    wanted = [False] * (n_tokens - 1) + [True]
    context.decode([_TOKEN] * n_tokens, range(n_tokens), [sequence] * n_tokens, wanted)
    context.logits(n_tokens - 1)


def decode(context: Context, position: int, n_sequences: int = 1) -> None:
    """Compute one token of each of the first sequences, and wait for them."""
    context.decode([_TOKEN] * n_sequences, [position] * n_sequences, range(n_sequences), [True] * n_sequences)
    context.logits(0)
