"""A `llama_cpp.Llama` under the controls that steer it: which of its methods are replaced, and by what.

Every answer of `Llama` goes through its `generate` and `eval`, which are replaced on the instance while it
is steered. Its cache of keys and values survives a change of edit or strength (`Llama.generate` in
llama_cpp/llama.py reuses the longest common prefix whatever the adapters are), so this module keeps for
every cached token the strengths it was computed under, and drops what another request may not reuse.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control import ControlFile
from alignez_gguf.errors import SteeringError
from alignez_gguf.exporters.stock import digest
from alignez_gguf.runtime.attached import Attached
from alignez_gguf.scope import Scope

_ATTRIBUTE = "_alignez_steering"
_REPLACED = ("generate", "eval", "embed", "save_state", "load_state")


class Control:
    """One of the controls that steer a model."""

    def __init__(self, control: ControlFile, strength: float, scope: Scope, attached: Attached) -> None:
        self.strength = strength
        self.scope = scope
        self.attached = attached
        self.digest = digest(control.edits)
        self.positions = range(0)
        """What is steered in the present request."""

    def steer(self, positions: range) -> None:
        """Steer these positions, and no others, from the next decode on."""
        self.positions = positions
        self.attached.steer(self.strength, positions)

    def strength_at(self, position: int) -> float:
        """Of the token there; 0 where it is not steered."""
        return self.strength if position in self.positions else 0.0


@dataclass(frozen=True)
class _Saved:
    """The part of a saved state that only the same controls may go on from."""

    digests: tuple[str, ...]
    """Of the edits of each control."""
    strengths: tuple[tuple[float, ...], ...]
    """Of every token that was cached, by control."""
    scores: NDArray[np.float32]
    """`LlamaState.scores` of all of them."""


class SteeredModel:
    """The controls of a `Llama`, in the order in which they were attached and act."""

    def __init__(self, llm: Any) -> None:
        self.controls: list[Control] = []
        self._llm = llm
        self._in_generate = False
        self._n_detached = 0
        self._cached: list[tuple[float, ...]] = [()] * llm.n_tokens
        """Strengths that each cached token was computed under, by control."""
        self._original: dict[str, Callable[..., Any]] = {name: getattr(llm, name) for name in _REPLACED}
        self._generate_signature = inspect.signature(llm.generate)

    @classmethod
    def of(cls, llm: Any) -> SteeredModel:
        """The one that `llm` has while controls are attached, else a new one."""
        steered: SteeredModel | None = vars(llm).get(_ATTRIBUTE)
        return cls(llm) if steered is None else steered

    @property
    def is_closed(self) -> bool:
        """Whether the `Llama` was closed."""
        return getattr(self._llm._ctx, "ctx", None) is None

    def attach(self, control: Control) -> None:
        """Take another control in, which steers from the next request on."""
        if not self.controls:
            for name in _REPLACED:
                setattr(self._llm, name, getattr(self, f"_{name}"))
            setattr(self._llm, _ATTRIBUTE, self)
        self.controls.append(control)
        self._cached = [(*strengths, 0.0) for strengths in self._cached]

    def detach(self, control: Control) -> None:
        """Let a control go; the cache keeps only what it had no part in."""
        number = self.controls.index(control)
        unsteered = self._n_cached_with(lambda _, strengths: strengths[number] == 0)
        self._cached = [strengths[:number] + strengths[number + 1 :] for strengths in self._cached]
        del self.controls[number]
        self._n_detached += 1
        if not self.controls:
            for name in (*_REPLACED, _ATTRIBUTE):
                delattr(self._llm, name)
        if not self.is_closed:
            self._keep_prefix(unsteered)
            control.attached.detach()

    def _begin(self, n_prompt: int) -> None:
        """Start a request whose prompt ends at position `n_prompt`."""
        for control in self.controls:
            first, end = control.scope.positions(n_prompt)
            control.steer(range(first, self._llm.n_ctx() if end is None else end))

    def _strengths(self, position: int) -> tuple[float, ...]:
        return tuple(control.strength_at(position) for control in self.controls)

    def _n_cached_with(self, holds: Callable[[int, tuple[float, ...]], bool]) -> int:
        """Number of cached tokens, from the start, of whose position and strengths something holds."""
        n_tokens: int = self._llm.n_tokens
        for position, strengths in enumerate(self._cached[:n_tokens]):
            if not holds(position, strengths):
                return position
        return n_tokens

    def _keep_prefix(self, length: int) -> None:
        llm = self._llm
        if length >= llm.n_tokens:
            return
        if length == 0 or not llm._ctx.kv_cache_seq_rm(-1, length, -1):
            # a recurrent or sliding-window cache cannot be cut in the middle
            llm.reset()
            return
        llm.n_tokens = length
        llm._requires_eval = True

    def _generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        bound = self._generate_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        n_cached = 0 if bound.arguments["reset"] else self._llm.n_tokens
        self._begin(n_cached + len(bound.arguments["tokens"]))
        if bound.arguments["reset"]:
            self._keep_prefix(
                self._n_cached_with(lambda position, strengths: strengths == self._strengths(position))
            )
        tokens = self._original["generate"](*bound.args, **bound.kwargs)
        n_detached = self._n_detached
        sent: Sequence[int] | None = None
        while True:
            # not while the caller has the token: the answer may be left unfinished
            self._in_generate = True
            try:
                token = tokens.send(sent)
            except StopIteration:
                return
            finally:
                self._in_generate = False
            sent = yield token
            if self.is_closed or self._n_detached != n_detached:
                raise SteeringError(
                    "a steering was removed, or the model closed, in the middle of this answer; ask again"
                )

    def _eval(self, tokens: Sequence[int]) -> None:
        first = self._llm.n_tokens
        if not self._in_generate and (first == 0 or len(tokens) > 1):
            self._begin(first + len(tokens))
        self._cached[first:] = map(self._strengths, range(first, first + len(tokens)))
        done = 0
        # the first speaks for all: adapters, whose cuts depend on the strength, are alone (steering._nested)
        for length in self.controls[0].attached.pieces(first, len(tokens)):
            self._original["eval"](tokens[done : done + length])
            done += length

    def _embed(self, *args: Any, **kwargs: Any) -> Any:
        steered = [control.positions for control in self.controls]
        for control in self.controls:
            control.steer(range(0))
        try:
            return self._original["embed"](*args, **kwargs)
        finally:
            for control, positions in zip(self.controls, steered, strict=True):
                control.steer(positions)

    def _save_state(self) -> Any:
        """Save a state, whole for these controls, that ends before the first steered token for others."""
        state = self._original["save_state"]()
        strengths = tuple(self._cached[: state.n_tokens])
        setattr(state, _ATTRIBUTE, _Saved(self._digests(), strengths, state.scores))
        unsteered = self._n_cached_with(lambda _, strengths: not any(strengths))
        if unsteered < state.n_tokens and (self._llm._is_recurrent or self._llm._is_hybrid):
            unsteered = 0  # such a state cannot be cut in the middle
        state.n_tokens, state.scores = unsteered, state.scores[:unsteered]
        return state

    def _load_state(self, state: Any) -> None:
        saved = getattr(state, _ATTRIBUTE, None)
        strengths: tuple[tuple[float, ...], ...] = ((0.0,) * len(self.controls),) * state.n_tokens
        if saved is not None and saved.digests == self._digests():
            strengths = saved.strengths
            state = copy.copy(state)
            state.n_tokens, state.scores = len(strengths), saved.scores
        self._original["load_state"](state)
        self._cached = list(strengths)

    def _digests(self) -> tuple[str, ...]:
        return tuple(control.digest for control in self.controls)
