"""A `llama_cpp.Llama` under the controls that steer it: which of its methods are replaced, and by what.

Every answer of `Llama` goes through its `generate` and `eval`, which are replaced on the instance while it
is steered. Its cache of keys and values survives a change of edit or strength (`Llama.generate` in
llama_cpp/llama.py reuses the longest common prefix whatever the adapters are), so this module keeps for
every cached token the strengths it was computed under, and drops what another request may not reuse.

A chat handler for images evaluates a prompt in parts, the images by itself, before `generate` gets it as a
whole (MTMDChatHandler in llama_cpp/llama_chat_format.py). Where the model has a handler, such parts are the
inside of a prompt, and `generate` computes its last token again, steered.

Where a control has a gate, `generate` computes the prompt unsteered first, which decides whether the control
steers this request; if so, what is steered of the prompt is computed again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control import ControlFile
from alignez_gguf.edits import digest
from alignez_gguf.errors import SteeringError
from alignez_gguf.runtime.attached import SteeringBackend
from alignez_gguf.scope import Scope

_ATTRIBUTE = "_alignez_steering"
_REPLACED = ("generate", "eval", "sample", "embed", "reset", "save_state", "load_state")


class AttachedControl:
    """One of the controls that steer a model."""

    def __init__(self, control: ControlFile, strength: float, scope: Scope, backend: SteeringBackend) -> None:
        self.strength = strength
        self.scope = scope
        self.gate = control.gate
        self.backend = backend
        self.digest = digest(control.edits)
        self.positions = range(0)
        """What is steered in the present request."""

    def steer(self, positions: range) -> None:
        """Steer these positions, and no others, from the next decode on."""
        self.positions = positions
        self.backend.steer(self.strength, positions)

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
    foreign: range
    scores: NDArray[np.float32]
    """`LlamaState.scores` of all of them."""


class LlamaHooks:
    """The controls of a `Llama`, in the order in which they were attached and act."""

    def __init__(self, llm: Any) -> None:
        self.controls: list[AttachedControl] = []
        self._llm = llm
        self._computes = False
        """Whether a replaced method is under way, so that those it calls belong to its request."""
        self._is_part = False
        """Whether the last `eval` is taken for a part of a prompt, whose last token is not steered yet."""
        self._n_detached = 0
        self._cached: list[tuple[float, ...]] = [()] * llm.n_tokens
        """Strengths that each cached token was computed under, by control."""
        self._foreign = self._unknown(llm.n_tokens)
        """From the first cached token that somebody else computed to the last; their ids mean nothing."""
        self._original: dict[str, Callable[..., Any]] = {name: getattr(llm, name) for name in _REPLACED}
        self._generate_signature = inspect.signature(llm.generate)

    @classmethod
    def of(cls, llm: Any) -> LlamaHooks:
        """The one that `llm` has while controls are attached, else a new one."""
        hooks: LlamaHooks | None = vars(llm).get(_ATTRIBUTE)
        return cls(llm) if hooks is None else hooks

    @property
    def is_closed(self) -> bool:
        """Whether the `Llama` was closed."""
        return getattr(self._llm._ctx, "ctx", None) is None

    def attach(self, control: AttachedControl) -> None:
        """Take another control in, which steers from the next request on."""
        if not self.controls:
            for name in _REPLACED:
                setattr(self._llm, name, getattr(self, f"_{name}"))
            setattr(self._llm, _ATTRIBUTE, self)
        self.controls.append(control)
        self._cached = [(*strengths, 0.0) for strengths in self._cached]

    def detach(self, control: AttachedControl) -> None:
        """Let a control go; the cache keeps only what it had no part in."""
        number = self.controls.index(control)
        if not self.is_closed:
            control.steer(range(0))  # off, whatever becomes of the rest
        unsteered = self._n_cached_with(lambda _, strengths: strengths[number] == 0)
        self._cached = [strengths[:number] + strengths[number + 1 :] for strengths in self._cached]
        del self.controls[number]
        self._n_detached += 1
        if not self.controls:
            for name in (*_REPLACED, _ATTRIBUTE):
                delattr(self._llm, name)
        if not self.is_closed:
            # `Llama.generate` goes on from any prefix, whatever the window still has
            self._keep_prefix(unsteered if self.controls or self._n_gone() == 0 else 0)
            control.backend.detach()

    def _begin_part(self) -> None:
        """Start a prompt whose end is not known yet: only a scope of all tokens steers it, without a gate."""
        gated = [control for control in self.controls if control.gate is not None]
        self._begin(self._llm.n_ctx() + 1, gated)
        self._is_part = True

    def _begin(self, n_prompt: int, closed: Collection[AttachedControl] = ()) -> None:
        """Start a request whose prompt ends at position `n_prompt`, without the controls of a closed gate."""
        self._is_part = False
        for control in self.controls:
            if control in closed:
                control.steer(range(0))
                continue
            first, end = control.scope.positions(n_prompt)
            control.steer(range(first, self._llm.n_ctx() if end is None else end))

    def _ask_gates(self, prompt: list[int], *, is_whole: bool) -> list[AttachedControl]:
        """Compute a prompt unsteered, where a control has a gate; those whose gate stays closed for it.

        A control at strength 0 sits the request out, and is not asked.

        Raises:
            SteeringError: the prompt goes on from a text in the cache, whose end no gate was made for.
        """
        import llama_cpp

        gated = [control for control in self.controls if control.gate is not None]
        off = [control for control in gated if control.strength == 0]
        if len(off) == len(gated):
            return off
        if not is_whole:
            raise SteeringError(
                "a control with a gate is asked at the end of a whole prompt; call generate with reset=True"
            )
        self._begin(len(prompt), self.controls)
        self._keep_prefix(self._n_reusable(prompt))
        rest = prompt[self._llm.n_tokens :]
        if rest:
            self._computes = True
            try:
                self._eval(rest)
            finally:
                self._computes = False
        row = llama_cpp.llama_get_logits_ith(self._llm._ctx.ctx, -1)
        logits = np.ctypeslib.as_array(row, (self._llm.n_vocab(),))
        return [
            control
            for control in gated
            if control in off or (control.gate is not None and not control.gate.opens(logits))
        ]

    def _strengths(self, position: int) -> tuple[float, ...]:
        return tuple(control.strength_at(position) for control in self.controls)

    def _n_cached_with(self, holds: Callable[[int, tuple[float, ...]], bool]) -> int:
        """Number of cached tokens, from the start, of whose position and strengths something holds."""
        n_tokens: int = self._llm.n_tokens
        for position, strengths in enumerate(self._cached[:n_tokens]):
            if not holds(position, strengths):
                return position
        return n_tokens

    def _take_stock(self) -> None:
        """Note the tokens that somebody else has put into the cache, under the strengths in force."""
        n_tokens = self._llm.n_tokens
        del self._cached[n_tokens:]
        added = range(len(self._cached), n_tokens)
        kept = range(self._foreign.start, min(self._foreign.stop, n_tokens))
        self._foreign = range((kept or added).start, n_tokens if added else kept.stop)
        self._cached += map(self._strengths, added)

    def _unknown(self, n_tokens: int) -> range:
        """Which of so many tokens, cached while nothing was attached, somebody else may have computed."""
        return range(n_tokens if self._llm.chat_handler is not None else 0)

    def _can_go_on_from(self, length: int) -> bool:
        """Whether the cache has all that a token at position `length` attends to.

        A cache of a sliding window loses the tokens that have left it, and removes its end all the same
        (llama_kv_cache::seq_rm in src/llama-kv-cache.cpp); llama-server makes this check, too.
        """
        import llama_cpp

        if self._llm._is_recurrent or self._llm._is_hybrid:
            return False
        window = llama_cpp.llama_model_n_swa(self._llm._model.model)
        return self._n_gone() <= max(0, int(length + 1 - window))

    def _n_gone(self) -> int:
        """Number of tokens that have left a sliding window and are no longer in its cache."""
        import llama_cpp

        if llama_cpp.llama_model_n_swa(self._llm._model.model) == 0 or self._llm.n_tokens == 0:
            return 0
        memory = llama_cpp.llama_get_memory(self._llm._ctx.ctx)
        return int(llama_cpp.llama_memory_seq_pos_min(memory, 0))

    def _keep_prefix(self, length: int) -> None:
        llm = self._llm
        if length >= llm.n_tokens:
            return
        if length and self._can_go_on_from(length) and llm._ctx.kv_cache_seq_rm(-1, length, -1):
            llm.n_tokens = length
            llm._requires_eval = True
        else:
            self._original["reset"]()

    def _n_reusable(self, prompt: list[int]) -> int:
        """Number of cached tokens that `prompt` begins with, computed under the strengths of this request.

        Raises:
            SteeringError: it holds tokens of somebody else that would have to be computed again.
        """
        llm = self._llm
        cached: list[int] = llm.input_ids[: llm.n_tokens].tolist()
        length = self._n_cached_with(lambda position, strengths: strengths == self._strengths(position))
        goes_on = bool(self._foreign) and prompt[: len(cached)] == cached
        if self._foreign and not goes_on:
            length = min(length, self._foreign.start)
        same = (ours == theirs for ours, theirs in zip(cached[:length], prompt, strict=False))
        length = next(
            (position for position, equal in enumerate(same) if not equal), min(length, len(prompt))
        )
        # A last token whose logits are gone is computed again, as by `Llama.generate`.
        if length == len(prompt) and (length < len(cached) or llm._requires_eval):
            length -= 1
        is_cut = length < len(cached)
        if goes_on and (length < self._foreign.stop or (is_cut and not self._can_go_on_from(length))):
            raise SteeringError(
                "the prompt holds an image or other input that only its chat handler can compute, and it "
                "was computed under another steering or cannot be cut; ask again through the chat handler"
            )
        return length

    def _generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        bound = self._generate_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._take_stock()
        prompt = list(bound.arguments["tokens"])
        n_cached = 0 if bound.arguments["reset"] else self._llm.n_tokens
        closed = self._ask_gates(prompt, is_whole=n_cached == 0)
        if n_cached == 0:
            bound.arguments["reset"] = True  # the prompt may be in the cache now
        self._begin(n_cached + len(prompt), closed)
        if bound.arguments["reset"]:
            self._keep_prefix(self._n_reusable(prompt))
        tokens = self._original["generate"](*bound.args, **bound.kwargs)
        n_detached = self._n_detached
        sent: Sequence[int] | None = None
        while True:
            # not while the caller has the token: the answer may be left unfinished
            self._computes = True
            try:
                token = tokens.send(sent)
            except StopIteration:
                return
            finally:
                self._computes = False
            sent = yield token
            if self.is_closed or self._n_detached != n_detached:
                raise SteeringError(
                    "a steering was removed, or the model closed, in the middle of this answer; ask again"
                )

    def _eval(self, tokens: Sequence[int]) -> None:
        self._take_stock()
        first = self._llm.n_tokens
        gated = any(control.gate is not None and control.strength for control in self.controls)
        if not self._computes and self._llm.chat_handler is not None:
            if first == 0 or gated:
                self._begin_part()
        elif not self._computes and gated:
            raise SteeringError("a control with a gate steers what generate computes, and eval is no request")
        elif not self._computes and (first == 0 or len(tokens) > 1):
            self._begin(first + len(tokens))
        self._cached[first:] = map(self._strengths, range(first, first + len(tokens)))
        done = 0
        # the first speaks for all: adapters, whose cuts depend on the strength, are alone (steering._nested)
        for length in self.controls[0].backend.split_batch(first, len(tokens)):
            self._original["eval"](tokens[done : done + length])
            done += length

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Draw a token, unless it would follow one that should be steered and is not."""
        waits = any(control.strength and not control.positions for control in self.controls)
        if self._is_part and waits and not self._computes:
            raise SteeringError(
                "what eval computes for a model with a chat handler is taken for a part of a prompt, whose "
                "end is not steered yet; use generate, or load the model without the handler"
            )
        return self._original["sample"](*args, **kwargs)

    def _embed(self, *args: Any, **kwargs: Any) -> Any:
        steered = [control.positions for control in self.controls]
        for control in self.controls:
            control.steer(range(0))
        self._computes = True
        try:
            return self._original["embed"](*args, **kwargs)
        finally:
            self._computes = False
            for control, positions in zip(self.controls, steered, strict=True):
                control.steer(positions)

    def _reset(self) -> None:
        self._original["reset"]()
        self._cached.clear()
        self._foreign = range(0)
        if not self._computes and self._llm.chat_handler is not None:
            self._begin_part()

    def _save_state(self) -> Any:
        """Save a state, whole for these controls, that ends before the first steered token for others."""
        state = self._original["save_state"]()
        self._take_stock()
        saved = _Saved(self._digests(), tuple(self._cached), self._foreign, state.scores)
        setattr(state, _ATTRIBUTE, saved)
        unsteered = self._n_cached_with(lambda _, strengths: not any(strengths))
        if self._foreign:
            unsteered = min(unsteered, self._foreign.start)
        if unsteered < state.n_tokens and not self._can_go_on_from(unsteered):
            unsteered = 0  # such a state cannot be cut in the middle
        state.n_tokens, state.scores = unsteered, state.scores[:unsteered]
        return state

    def _load_state(self, state: Any) -> None:
        saved = getattr(state, _ATTRIBUTE, None)
        strengths: tuple[tuple[float, ...], ...] = ((0.0,) * len(self.controls),) * state.n_tokens
        foreign = self._unknown(state.n_tokens) if saved is None else range(0)
        if saved is not None and saved.digests == self._digests():
            strengths, foreign = saved.strengths, saved.foreign
            state = copy.copy(state)
            state.n_tokens, state.scores = len(strengths), saved.scores
        self._original["load_state"](state)
        self._cached, self._foreign = list(strengths), foreign

    def _digests(self) -> tuple[str, ...]:
        return tuple(control.digest for control in self.controls)
