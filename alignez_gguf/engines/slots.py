"""The sequences of a context: what each one holds, and which part of it another can take over.

What a sequence computes depends on its own tokens and treatment alone. The CPU kernels of llama.cpp make
that true bit for bit for F32, F16 and Q8_0 weights on x86 under conditions that are kept here:

- each sequence has cells of its own, so attention adds up in the order of positions;
- a piece of a prompt has fewer than 64 tokens, so attention never takes the tiled kernel, whose sums depend
  on where the piece begins (GGML_FA_TILE_Q in ggml-cpu/common.h);
- a token is not computed alone where that would take other kernels: for products with float weights
  (llamafile_sgemm in ggml-cpu/llamafile/sgemm.cpp), and for attention over 512 cells or more
  (use_split_kv_path in ggml-cpu/ops.cpp).

Of other weights the kernels take four tokens at once, and round those that are left over differently
(ggml-cpu/repack.cpp), so that nothing is gained by these conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from alignez_gguf.engines.prompt_cache import PromptCache
from alignez_gguf.gate import Gate
from alignez_gguf.model_info import FLOAT_WEIGHTS
from alignez_gguf.runtime.context import Context
from alignez_gguf.runtime.model import Model

_ROWS = 4
"""Tokens that the kernels of quantized products take at once; those left over cost several times as much."""

EXACT_PIECE = 60
"""The longest piece of a prompt for which a CPU computes the same wherever it begins, in whole `_ROWS`."""

FAST_PIECE = 512
"""The longest piece of a prompt where rounding may depend on where it begins."""

LONE_POSITIONS = 256
"""Before this position a token attends to fewer than 512 cells: llama.cpp rounds up to multiples of 256."""

_WORTH_COPYING = 16
"""Copying a sequence costs about as much as computing a few tokens."""

_EXACT_WEIGHTS = FLOAT_WEIGHTS | {"Q8_0"}


def in_whole_rows(n_tokens: int) -> int:
    """The most tokens up to so many of which none are left over, if they are enough for that."""
    return n_tokens - n_tokens % _ROWS if n_tokens > _ROWS else n_tokens


def can_be_exact(model: Model) -> bool:
    """Whether a token of the model can be computed alike whatever is computed with it."""
    return not model.uses_gpu and model.info.quantization in _EXACT_WEIGHTS


def company_needed_from(quantization: str) -> int:
    """The first position at which a CPU computes a lone token by other kernels than one among others."""
    return 0 if quantization in FLOAT_WEIGHTS else LONE_POSITIONS


@dataclass(frozen=True)
class Treatment:
    """The strength of a control at the positions `first` to `end` (exclusive) of a sequence; elsewhere 0.

    Attributes:
        control: its number in the context, see `library.set_controls`. All others have strength 0.
    """

    strength: float = 0.0
    first: int = 0
    end: int | None = None
    control: int = 0

    def strength_at(self, position: int, control: int) -> float:
        within = self.first <= position and (self.end is None or position < self.end)
        return self.strength if within and control == self.control else 0.0

    def agrees_until(self, other: Treatment) -> float:
        """The first position that the two treat differently."""
        changes = (0, self.first, self.end, other.first, other.end)
        differing = [
            position
            for position in changes
            for control in (self.control, other.control)
            if position is not None
            and self.strength_at(position, control) != other.strength_at(position, control)
        ]
        return min(differing, default=float("inf"))


UNSTEERED = Treatment()


@dataclass
class _Held:
    """What the cache of one sequence was computed from."""

    tokens: list[int]
    treatment: Treatment

    def shared_with(self, tokens: Sequence[int], treatment: Treatment) -> int:
        """How many positions of a new prompt are computed already."""
        limit = min(len(self.tokens), len(tokens), self.treatment.agrees_until(treatment))
        return next((i for i in range(int(limit)) if self.tokens[i] != tokens[i]), int(limit))


@dataclass(frozen=True)
class Piece:
    """A part of a text that is computed at once.

    Attributes:
        tokens: from the position `begin` on.
        n_wanted: so many tokens at its end are wanted.
        is_last: whether the text ends with it.
    """

    tokens: Sequence[int]
    begin: int
    n_wanted: int
    is_last: bool

    @property
    def n_outputs(self) -> int:
        """How many tokens at the end have logits: those that are wanted.

        One alone takes other kernels in the last layer, so that it would depend on where the piece begins
        whether it does.
        """
        alone = self.n_wanted == 1 and not self.is_last
        return min(len(self.tokens), 2) if alone else self.n_wanted

    @property
    def wanted(self) -> range:
        """The indices of the logits of the tokens that are wanted."""
        return range(len(self.tokens) - self.n_wanted, len(self.tokens))


class Slots:
    """Numbered sequences of one context.

    Args:
        context: whose sequences these are; used by nothing else.
        piece: the most tokens of a prompt computed at once.
        company_from: from this position on, a token that would be computed alone is computed twice. The
            context must have a second sequence then.
        steer: tells the context that a sequence is steered; called before its tokens are computed.
        prompts: what other contexts of the model have computed, and where `keep` keeps what these do.
    """

    def __init__(
        self,
        context: Context,
        *,
        piece: int = EXACT_PIECE,
        company_from: int | None = None,
        steer: Callable[[Context, int, Treatment], None] | None = None,
        prompts: PromptCache | None = None,
    ) -> None:
        self.context = context
        self._piece = piece
        self._company_from = company_from
        self._steer = steer
        self._prompts = prompts
        self._held = [_Held([], UNSTEERED) for _ in range(context.n_sequences)]

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        treatment: Treatment = UNSTEERED,
        gate: Gate | None = None,
    ) -> int:
        """Make a slot hold a prompt, computing only what no slot holds; the index of its logits.

        Where a gate stays closed, the slot and the logits are those of the unsteered prompt.
        """
        if gate is not None and treatment.strength:
            index = self.prefill(slot, tokens)
            if not gate.opens(self.context.logits(index)):
                return index
        pieces = self.plan(slot, tokens, len(tokens) - 1, treatment)
        for piece in pieces:
            self.compute(slot, piece)
        return len(pieces[-1].tokens) - 1

    def plan(
        self, slot: int, tokens: Sequence[int], first_wanted: int, treatment: Treatment = UNSTEERED
    ) -> list[Piece]:
        """Prepare a slot to hold a text; the pieces that it has to `compute`, in order.

        Parts of the text that any slot has computed under the same treatment are taken over, but only before
        the position `first_wanted`; so is what was kept of all that comes before it.
        """
        start = self._take_over(slot, tokens, treatment, first_wanted)
        if self._steer is not None:
            self._steer(self.context, slot, treatment)
        return [
            Piece(tokens[begin:end], begin, max(0, end - max(begin, first_wanted)), end == len(tokens))
            for begin, end in _pieces(start, len(tokens), self._piece)
        ]

    def compute(self, slot: int, piece: Piece) -> None:
        """Compute the next piece of what was planned for a slot."""
        self._compute({slot: piece})

    def compute_together(self, pieces: Sequence[Piece]) -> None:
        """Compute the next piece of each of the first slots; they have to be equally long.

        Their logits are numbered on from piece to piece. Of unequal ones llama.cpp would compute what some
        have more than others in a batch of its own, which may be a lone token
        (`llama_batch_allocr::split_equal` in src/llama-batch.cpp).
        """
        if len({len(piece.tokens) for piece in pieces}) != 1:
            raise ValueError("pieces that are computed together must have as many tokens each")
        self._compute(dict(enumerate(pieces)))

    def keep(self, slot: int) -> None:
        """Keep what a slot holds of an unsteered prompt, to be found by all its tokens but the last.

        That one is computed again in any case, for what is wanted of it.
        """
        held = self._held[slot]
        if self._prompts is None or held.treatment.agrees_until(UNSTEERED) < len(held.tokens):
            return
        state = self.context.save_sequence(slot)
        if state is not None:
            self._prompts.keep(held.tokens[:-1], state)

    def is_steered(self, slot: int) -> bool:
        """Whether a slot holds a text that is steered, from some position on."""
        return self._held[slot].treatment.strength > 0

    def recall(self, slot: int, tokens: Sequence[int]) -> bool:
        """Whether a slot holds these tokens unsteered, and maybe more, loading them where they were kept."""
        self._load(slot, tokens)
        return self._held[slot].shared_with(tokens, UNSTEERED) == len(tokens)

    def step(self, tokens: Sequence[int]) -> None:
        """Add `tokens[i]` to slot i for each of the first slots; its logits have index i."""
        slots = list(range(len(tokens)))
        positions = [len(self._held[slot].tokens) for slot in slots]
        if len(tokens) == 1 and self._company_from is not None and positions[0] >= self._company_from:
            self._forget(1)
            self.context.decode([*tokens, *tokens], [*positions, 0], [0, 1], [True, True])
            self.context.truncate_sequence(1, 0)
        else:
            self.context.decode(tokens, positions, slots, [True] * len(tokens))
        for slot, token in zip(slots, tokens, strict=True):
            self._held[slot].tokens.append(token)

    def move(self, source: int, target: int) -> None:
        """Give what one slot holds to another."""
        held = self._held[source]
        self._copy(source, target, len(held.tokens))
        if self._steer is not None:
            self._steer(self.context, target, held.treatment)

    def clear(self) -> None:
        """Forget everything, as a new edit requires."""
        self.context.clear()
        self._held = [_Held([], UNSTEERED) for _ in self._held]

    def _compute(self, pieces: Mapping[int, Piece]) -> None:
        """A piece for each of some slots, one after the other in one batch."""
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        outputs: list[bool] = []
        for slot, piece in pieces.items():
            count = len(piece.tokens)
            tokens += piece.tokens
            positions += range(piece.begin, piece.begin + count)
            sequences += [slot] * count
            outputs += [index >= count - piece.n_outputs for index in range(count)]
        self.context.decode(tokens, positions, sequences, outputs)
        for slot, piece in pieces.items():
            self._held[slot].tokens += piece.tokens

    def _take_over(self, slot: int, tokens: Sequence[int], treatment: Treatment, limit: int) -> int:
        """Leave in the cache of a slot only what the new prompt begins with; the number of positions."""
        self._load(slot, tokens[:limit])
        shared = [held.shared_with(tokens, treatment) for held in self._held]
        donor = max(range(len(shared)), key=shared.__getitem__)
        if shared[donor] < shared[slot] + _WORTH_COPYING:
            donor = slot
        # The last two tokens are always computed: one for its logits, two so as not to be a single row.
        keep = max(0, min(shared[donor], len(tokens) - 2, limit))
        if donor != slot:
            self._copy(donor, slot, keep)
        if not self.context.truncate_sequence(slot, keep):
            self.context.truncate_sequence(slot, 0)
            keep = 0
        self._held[slot] = _Held(list(tokens[:keep]), treatment)
        return keep

    def _load(self, slot: int, prompt: Sequence[int]) -> None:
        """Make a slot hold a prompt that was kept, unless slots hold nearly all of it."""
        if self._prompts is None or prompt not in self._prompts:
            return
        computed = max(held.shared_with(prompt, UNSTEERED) for held in self._held)
        state = self._prompts.find(prompt) if computed + _WORTH_COPYING < len(prompt) else None
        if state is not None:
            loaded = self.context.load_sequence(slot, state)
            self._held[slot] = _Held(list(prompt) if loaded else [], UNSTEERED)

    def _copy(self, source: int, target: int, length: int) -> None:
        self.context.copy_sequence(source, target)
        held = self._held[source]
        self._held[target] = _Held(held.tokens[:length], held.treatment)

    def _forget(self, slot: int) -> None:
        self.context.truncate_sequence(slot, 0)
        self._held[slot] = _Held([], UNSTEERED)


def _pieces(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` positions, as few and as even as whole `_ROWS` allow."""
    count = -(-(end - start) // size)
    rows = -(-(end - start) // _ROWS)
    return list(pairwise(min(start + _ROWS * (rows * i // count), end) for i in range(count + 1)))
