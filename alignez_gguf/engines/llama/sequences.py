"""The sequences of a context: the KV cache of each, and which prefix of it a new prompt can reuse.

What a sequence computes depends on its own tokens and steering alone. The CPU kernels of llama.cpp make that
true bit for bit for F32, F16 and Q8_0 weights on x86 under conditions that are kept here:

- each sequence has cells of its own, so attention adds up in the order of positions;
- a prefill chunk has fewer than 64 tokens, so attention never takes the tiled kernel, whose sums depend on
  where the chunk begins (GGML_FA_TILE_Q in ggml-cpu/common.h);
- a token is not computed alone where that would take other kernels: for products with float weights
  (llamafile_sgemm in ggml-cpu/llamafile/sgemm.cpp), and for attention over 512 cells or more
  (use_split_kv_path in ggml-cpu/ops.cpp).

Of other weights the kernels take four tokens at once, and round those that are left over differently
(ggml-cpu/repack.cpp), so that nothing is gained by these conditions, and chunks are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

from alignez_gguf.control.edits import Edits
from alignez_gguf.control.model_info import FLOAT_WEIGHTS
from alignez_gguf.engines.llama.prefix_cache import PrefixCache
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model

EXACT_CHUNK_TOKENS = 60
"""The longest prefill chunk of a model that is computed exactly."""

FAST_CHUNK_TOKENS = 512
"""The longest prefill chunk where rounding may depend on where it begins."""

_SPLIT_KV_FROM = 256
"""Before this position a token attends to fewer than 512 cells: llama.cpp rounds up to multiples of 256."""

_WORTH_COPYING = 16
"""Copying a sequence costs about as much as computing this many tokens."""

_EXACT_WEIGHTS = FLOAT_WEIGHTS | {"Q8_0"}


@dataclass(frozen=True)
class SequenceSteering:
    """The strength of one control over the positions [first, end) of a sequence; elsewhere it is 0.

    Attributes:
        strength: 0 leaves the model as it is.
        first: the first steered position.
        end: behind the last one; None for no end.
        control: its number in the context, see `bindings.set_controls`. All others have strength 0.
    """

    strength: float = 0.0
    first: int = 0
    end: int | None = None
    control: int = 0

    def at(self, position: int) -> tuple[int, float] | None:
        """Return the control that acts at a position, and its strength; None where none does."""
        acts = self.strength > 0 and self.first <= position < (inf if self.end is None else self.end)
        return (self.control, self.strength) if acts else None

    def agrees_until(self, other: SequenceSteering) -> float:
        """Return the first position that the two steer differently, or infinity."""
        changes = {0, self.first, other.first} | {end for end in (self.end, other.end) if end is not None}
        return min((position for position in changes if self.at(position) != other.at(position)), default=inf)


UNSTEERED = SequenceSteering()


def can_be_exact(model: Model) -> bool:
    """Whether a token of the model can be computed alike whatever is computed with it."""
    return not model.uses_gpu and model.info.quantization in _EXACT_WEIGHTS


@dataclass
class _Cached:
    """The tokens and the steering that the KV cache of one sequence was computed from."""

    tokens: list[int]
    steering: SequenceSteering

    def shared_with(self, tokens: Sequence[int], steering: SequenceSteering) -> int:
        """Return how many positions of a new prompt it holds."""
        limit = int(min(len(self.tokens), len(tokens), self.steering.agrees_until(steering)))
        return next((i for i in range(limit) if self.tokens[i] != tokens[i]), limit)


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens of a prompt that are computed at once.

    Attributes:
        tokens: from the position `begin` on.
        n_wanted: the number of its last tokens whose hidden states or logits are read.
    """

    tokens: Sequence[int]
    begin: int
    n_wanted: int

    @property
    def n_outputs(self) -> int:
        """The number of its last tokens that have logits: at least two, where any is wanted.

        One alone takes other kernels in the last layer, and where chunks begin would decide whether it is.
        """
        return min(len(self.tokens), max(self.n_wanted, 2)) if self.n_wanted else 0

    @property
    def wanted(self) -> range:
        """The indices of the logits of the tokens that are wanted."""
        return range(len(self.tokens) - self.n_wanted, len(self.tokens))


class Sequences:
    """Numbered sequences of a context of their own.

    Args:
        model: has to outlive them.
        n_ctx: the longest sequence, in tokens.
        n_sequences: the number of sequences, which are numbered from 0.
        n_threads: default: the number of physical cores.
        exact: a sequence may not depend on the others to the bit; see `can_be_exact`. `decode` needs a
            second sequence then, to pad a lone token with.
        controls: the edits of each control.
        prefix_cache: the prefixes that were cached by other contexts of the model, and where these go.
        on_node: see `Context`.

    Raises:
        SteeringError: llama.cpp refuses the edits.
        RuntimeUnavailableError: there are edits, and the patch is missing.
        ModelFileError: there is not enough memory.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_sequences: int = 1,
        n_threads: int | None = None,
        exact: bool = True,
        controls: Sequence[Edits] = (),
        prefix_cache: PrefixCache | None = None,
        on_node: Any = None,
    ) -> None:
        self._chunk_tokens = EXACT_CHUNK_TOKENS if exact else FAST_CHUNK_TOKENS
        self._pad_from = inf
        if exact:
            self._pad_from = 0 if model.info.quantization in FLOAT_WEIGHTS else _SPLIT_KV_FROM
        self._n_controls = len(controls)
        self._prefix_cache = prefix_cache
        self._cached = [_Cached([], UNSTEERED) for _ in range(n_sequences)]
        self.context = Context(
            model,
            n_ctx=n_ctx,
            n_sequences=n_sequences,
            n_batch=max(self._chunk_tokens, n_sequences),
            n_threads=n_threads,
            on_node=on_node,
        )
        try:
            if controls:
                bindings.set_controls(self.context.pointer, controls)
        except BaseException:
            self.context.close()
            raise

    def prefill(self, number: int, tokens: Sequence[int], steering: SequenceSteering = UNSTEERED) -> int:
        """Prefill a sequence with a prompt, reusing cached prefixes, and return the index of its logits."""
        chunks = self.plan(number, tokens, len(tokens) - 1, steering)
        for chunk in chunks:
            self.compute(number, chunk)
        return chunks[-1].wanted[-1]

    def plan(
        self, number: int, tokens: Sequence[int], first_wanted: int, steering: SequenceSteering = UNSTEERED
    ) -> list[PrefillChunk]:
        """Prepare a sequence to hold a text, and return the chunks that it has to `compute`, in order.

        A prefix that any sequence or the prefix cache holds under the same steering is reused, but only
        before the position `first_wanted`.
        """
        start = self._reuse_prefix(number, tokens, steering, first_wanted)
        self._steer(number, steering)
        count = len(tokens) - start
        n_chunks = -(-count // self._chunk_tokens)
        bounds = [start + count * i // n_chunks for i in range(n_chunks + 1)]  # even, or one would be alone
        return [
            PrefillChunk(tokens[begin:end], begin, max(0, end - max(begin, first_wanted)))
            for begin, end in pairwise(bounds)
        ]

    def compute(self, number: int, chunk: PrefillChunk) -> None:
        """Compute the next chunk of what was planned for a sequence."""
        count = len(chunk.tokens)
        outputs = [index >= count - chunk.n_outputs for index in range(count)]
        self.context.decode(chunk.tokens, range(chunk.begin, chunk.begin + count), [number] * count, outputs)
        self._cached[number].tokens += chunk.tokens

    def decode(self, tokens: Sequence[int]) -> None:
        """Add `tokens[i]` to sequence i, for each of the first sequences; its logits have index i.

        A lone token is padded to a batch of two where it would take other kernels alone.
        """
        positions = [len(self._cached[number].tokens) for number in range(len(tokens))]
        if len(tokens) == 1 and positions[0] >= self._pad_from:
            self._cached[1] = _Cached([], UNSTEERED)
            self.context.truncate_sequence(1, 0)
            self.context.decode([*tokens, *tokens], [*positions, 0], [0, 1], [True, True])
            self.context.truncate_sequence(1, 0)
        else:
            self.context.decode(tokens, positions, range(len(tokens)), [True] * len(tokens))
        for cached, token in zip(self._cached, tokens, strict=False):
            cached.tokens.append(token)

    def copy_sequence(self, source: int, target: int) -> None:
        """Give what one sequence holds to another, with its steering."""
        self.context.copy_sequence(source, target)
        cached = self._cached[source]
        self._cached[target] = _Cached(list(cached.tokens), cached.steering)
        self._steer(target, cached.steering)

    def cache_prefix(self, number: int) -> None:
        """Keep an unsteered prompt in the prefix cache, found by all its tokens but the last.

        That one is computed again in any case, for what is wanted of it.
        """
        cached = self._cached[number]
        if self._prefix_cache is None or cached.steering.agrees_until(UNSTEERED) < len(cached.tokens):
            return
        state = self.context.save_sequence(number)
        if state is not None:
            self._prefix_cache.add(cached.tokens[:-1], state)

    def clear(self) -> None:
        """Empty all sequences."""
        self.context.clear()
        self._cached = [_Cached([], UNSTEERED) for _ in self._cached]

    def close(self) -> None:
        """Free the context."""
        self.context.close()

    def _steer(self, number: int, steering: SequenceSteering) -> None:
        """Set the strength of every control, since another one may have steered the sequence before."""
        for control in range(self._n_controls):
            bindings.set_strength(
                self.context.pointer,
                steering.strength if control == steering.control else 0.0,
                control=control,
                sequence=number,
                first=steering.first,
                end=steering.end,
            )

    def _reuse_prefix(
        self, number: int, tokens: Sequence[int], steering: SequenceSteering, limit: int
    ) -> int:
        """Keep the cached prefix that a new prompt shares, in its sequence, and return its length."""
        self._restore_prefix(number, tokens[:limit])
        shared = [cached.shared_with(tokens, steering) for cached in self._cached]
        donor = max(range(len(shared)), key=shared.__getitem__)
        if shared[donor] < shared[number] + _WORTH_COPYING:
            donor = number
        # The last two tokens are always computed: one for its logits, two so as not to be a single row.
        length = max(0, min(shared[donor], len(tokens) - 2, limit))
        if donor != number:
            self.context.copy_sequence(donor, number)
        if not self.context.truncate_sequence(number, length):
            self.context.truncate_sequence(number, 0)
            length = 0
        self._cached[number] = _Cached(list(tokens[:length]), steering)
        return length

    def _restore_prefix(self, number: int, prefix: Sequence[int]) -> None:
        """Load a prefix that was cached into a sequence, unless some sequence holds nearly all of it."""
        if self._prefix_cache is None or prefix not in self._prefix_cache:
            return
        held = max(cached.shared_with(prefix, UNSTEERED) for cached in self._cached)
        state = self._prefix_cache.find(prefix) if held + _WORTH_COPYING < len(prefix) else None
        if state is not None:
            loaded = self.context.load_sequence(number, state)
            self._cached[number] = _Cached(list(prefix) if loaded else [], UNSTEERED)
