"""Two contexts in which decoding and prefill are timed side by side, one of them under a form of an edit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.forms import Form, NoEdit
from benchmarks.setting import Setting
from benchmarks.timing import alternated, in_turns, seconds

if TYPE_CHECKING:
    from alignez_gguf.runtime.context import Context
    from alignez_gguf.runtime.model import Model

_TOKEN = 7
"""Which token it is decides nothing about the time."""

_NOTHING = NoEdit()


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
    """A context on which tokens and prompts are timed; each token may be one of several sequences'."""

    def __init__(self, model: Model, setting: Setting, sizes: Sizes, n_sequences: int = 1) -> None:
        from alignez_gguf.runtime.context import Context

        self.sizes = sizes
        self.context = Context(
            model,
            n_ctx=max(sizes.n_prefill, sizes.n_before + sizes.most_tokens),
            n_sequences=n_sequences,
            n_batch=max(sizes.n_prefill, sizes.n_before),
            n_threads=setting.n_threads,
        )

    def fill(self) -> None:
        """Bring the first tokens into the cache; the last one alone, in a graph of its own."""
        self.context.clear()
        for sequence in range(self.context.n_sequences):
            prefill(self.context, self.sizes.n_before - 1, sequence)
        self.decode(-1)

    def decode(self, step: int) -> None:
        """Compute a token, counted from those that `fill` brings."""
        decode(self.context, self.sizes.n_before + step, self.context.n_sequences)

    def prefill(self) -> None:
        """Compute a prompt."""
        self.context.clear()
        prefill(self.context, self.sizes.n_prefill)

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


class Pair:
    """Two beds, whose runs take turns: tokens one by one, prompts one by one.

    Args:
        base, other: the beds.
        runs: of each comparison.
    """

    def __init__(self, base: Bed, other: Bed, runs: int) -> None:
        self.base, self.other = base, other
        self._runs = runs
        base.fill()
        self._n_tokens = base.sizes.n_decoded(seconds(lambda: base.decode(0)))
        base.prefill()
        self._n_prompts = max(1, round(base.sizes.run_seconds / seconds(base.prefill)))

    def decode(self, form: Form = _NOTHING, base_form: Form = _NOTHING) -> tuple[list[float], list[float]]:
        """Seconds of runs of as many tokens on both, under these forms."""

        def base_token(step: int) -> None:
            base_form.before_token()
            self.base.decode(step)

        def other_token(step: int) -> None:
            form.before_token()
            self.other.decode(step)

        with form, base_form:
            taken = []
            for _ in range(self._runs):
                self.base.fill()
                self.other.fill()
                taken.append(in_turns(base_token, other_token, self._n_tokens))
        return [base for base, _ in taken], [other for _, other in taken]

    def prefill(self, form: Form = _NOTHING) -> tuple[list[float], list[float]]:
        """Seconds of runs of as many prompts on both."""

        def run(bed: Bed) -> float:
            return seconds(lambda: [bed.prefill() for _ in range(self._n_prompts)])

        with form:
            self.other.prefill()
            return alternated(lambda: run(self.base), lambda: run(self.other), self._runs)


def prefill(context: Context, n_tokens: int, sequence: int = 0) -> None:
    """Compute the first tokens of a sequence in one piece, and wait for them."""
    wanted = [False] * (n_tokens - 1) + [True]
    context.decode([_TOKEN] * n_tokens, range(n_tokens), [sequence] * n_tokens, wanted)
    context.logits(n_tokens - 1)


def decode(context: Context, position: int, n_sequences: int = 1) -> None:
    """Compute one token of each of the first sequences, and wait for them."""
    context.decode([_TOKEN] * n_sequences, [position] * n_sequences, range(n_sequences), [True] * n_sequences)
    context.logits(0)
