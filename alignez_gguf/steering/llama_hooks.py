"""The hooks on a `llama_cpp.Llama` that is steered: which of its methods are replaced, and by what.

Every answer of `Llama` goes through its `generate` and `eval`, which are replaced on the instance while it
is steered. Its KV cache survives a change of edit or strength (`Llama.generate` in llama_cpp/llama.py reuses
the longest common prefix whatever the adapters are), so `LlamaHooks` knows how long a prefix of the cache was
computed under the same strengths throughout, mostly 0. A request that wants these reuses that prefix; the
rest is always computed again.

A chat handler for images evaluates a prompt in parts, the images by itself, before `generate` gets it as a
whole (MTMDChatHandler in llama_cpp/llama_chat_format.py). Where the model has a handler, such parts are the
inside of a prompt, and `generate` computes its last token again, steered.

Where a control has a gate, `generate` computes the prompt unsteered first, which decides whether the control
steers this request; if so, what is steered of the prompt is computed again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import edits_sha256
from alignez_gguf.control.scope import Scope
from alignez_gguf.errors import SteeringError
from alignez_gguf.steering.handle import ControlState
from alignez_gguf.steering.patched import SteeringBackend

_ATTRIBUTE = "_alignez_steering"
_REPLACED = ("generate", "eval", "sample", "embed", "reset", "save_state", "load_state")


class AttachedControl(ControlState):
    """One of the controls that steer a model."""

    def __init__(self, control: ControlFile, strength: float, scope: Scope, backend: SteeringBackend) -> None:
        super().__init__(strength, scope)
        self.gate = control.gate
        self.backend = backend
        self.digest = edits_sha256(control.edits)
        self.positions = range(0)
        """The positions that are steered in the present request."""

    def steer(self, positions: range) -> None:
        """Steer these positions, and no others, from the next decode on."""
        self.positions = positions
        self.backend.steer(self.strength, positions)

    def strength_at(self, position: int) -> float:
        """Return the strength of the token there; 0 where it is not steered."""
        return self.strength if position in self.positions else 0.0


@dataclass
class _Cached:
    """The strengths that the tokens in the KV cache of a `Llama` were computed under, as far as known."""

    n_tokens: int
    n_prefix: int
    """How many of them, from the first on, were all computed under `strengths`."""
    strengths: tuple[float, ...]
    """One for each control."""
    foreign: range
    """The positions from the first to the last token that somebody else computed; their ids mean nothing."""


@dataclass(frozen=True)
class _Saved:
    """A whole saved state, from which only controls of the same edits may go on."""

    digests: tuple[str, ...]
    cached: _Cached
    state: Any


class LlamaHooks:
    """The controls of a `Llama`, in the order in which they were attached and act."""

    def __init__(self, llm: Any) -> None:
        import llama_cpp

        self._api = llama_cpp
        self.controls: list[AttachedControl] = []
        self._llm = llm
        self._computes = False
        """Whether a replaced method is under way, so that those it calls belong to its request."""
        self._is_part = False
        """Whether the last `eval` is taken for a part of a prompt, whose last token is not steered yet."""
        self._n_detached = 0
        self._cached = self._unsteered(llm.n_tokens)
        self._original: dict[str, Callable[..., Any]] = {name: getattr(llm, name) for name in _REPLACED}
        self._generate_signature = inspect.signature(llm.generate)

    @classmethod
    def of(cls, llm: Any) -> LlamaHooks:
        """Return the hooks that `llm` has while controls are attached, else new ones."""
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
        self._cached.strengths += (0.0,)

    def detach(self, control: AttachedControl) -> None:
        """Let a control go; the cache keeps the prefix that it had no part in."""
        number = self.controls.index(control)
        if not self.is_closed:
            control.steer(range(0))  # off, whatever becomes of the rest
        strengths = list(self._cached.strengths)
        if strengths.pop(number):
            self._cached.n_prefix = 0
        self._cached.strengths = tuple(strengths)
        del self.controls[number]
        self._n_detached += 1
        if not self.controls:
            for name in (*_REPLACED, _ATTRIBUTE):
                delattr(self._llm, name)
        if not self.is_closed:
            # `Llama.generate` goes on from any prefix, whatever the window still has
            self._keep_prefix(self._cached.n_prefix if self.controls or self._n_gone() == 0 else 0)
            control.backend.detach()

    def _begin_part(self) -> None:
        """Start a prompt whose end is not known yet: only a scope of all tokens steers it, without a gate."""
        self._begin(self._llm.n_ctx() + 1, [control for control in self.controls if control.gate is not None])
        self._is_part = True

    def _begin(self, n_prompt: int, closed: Collection[AttachedControl] = ()) -> None:
        """Start a request whose prompt ends at position `n_prompt`, without the controls of a closed gate."""
        self._is_part = False
        for control in self.controls:
            first, end = (0, 0) if control in closed else control.scope.positions(n_prompt)
            control.steer(range(first, self._llm.n_ctx() if end is None else end))

    def _ask_gates(self, prompt: list[int], *, is_whole: bool) -> list[AttachedControl]:
        """Compute a prompt unsteered, where a control has a gate; those whose gate stays closed for it.

        A control at strength 0 sits the request out, and is not asked.

        Raises:
            SteeringError: the prompt goes on from a text in the cache, whose end no gate was made for.
        """
        gates = [(control, control.gate) for control in self.controls if control.gate is not None]
        off = [control for control, _ in gates if control.strength == 0]
        if len(off) == len(gates):
            return off
        if not is_whole:
            raise SteeringError(
                "a control with a gate is asked at the end of a whole prompt; call generate with reset=True"
            )
        self._begin(len(prompt), self.controls)
        self._keep_prefix(self._n_reusable(prompt))
        rest = prompt[self._llm.n_tokens :]
        if rest:
            with self._computing():
                self._eval(rest)
        row = self._api.llama_get_logits_ith(self._llm._ctx.ctx, -1)
        logits = np.ctypeslib.as_array(row, (self._llm.n_vocab(),))
        return [control for control, gate in gates if control in off or not gate.opens(logits)]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inside, the replaced methods belong to the request that is under way."""
        self._computes = True
        try:
            yield
        finally:
            self._computes = False

    def _strengths(self, position: int) -> tuple[float, ...]:
        return tuple(control.strength_at(position) for control in self.controls)

    def _unsteered(self, n_tokens: int) -> _Cached:
        """Describe tokens that were cached while nothing was attached: any code may have computed them."""
        foreign = range(n_tokens if self._llm.chat_handler is not None else 0)
        return _Cached(n_tokens, n_tokens, (0.0,) * len(self.controls), foreign)

    def _take_stock(self) -> None:
        """Note the tokens that have gone from the cache, and those that somebody else has put into it."""
        cached, n_tokens = self._cached, self._llm.n_tokens
        kept = range(cached.foreign.start, min(cached.foreign.stop, n_tokens))
        added = range(min(cached.n_tokens, n_tokens), n_tokens)
        cached.n_prefix = min(cached.n_prefix, n_tokens)
        cached.foreign = range((kept or added).start, n_tokens if added else kept.stop)
        self._note(added)

    def _note(self, added: range) -> None:
        """Note tokens behind all others that are computed under the strengths in force."""
        cached = self._cached
        if added and added.start == 0:
            cached.strengths = self._strengths(0)
        if added.start == cached.n_prefix:
            cached.n_prefix = self._end_of_alike(added)
        cached.n_tokens = added.stop

    def _end_of_alike(self, positions: range) -> int:
        """The first of these positions that is steered otherwise now than the prefix was, or their end."""
        wanted = self._cached.strengths
        return next((at for at in positions if self._strengths(at) != wanted), positions.stop)

    def _can_go_on_from(self, length: int) -> bool:
        """Whether the cache has all that a token at position `length` attends to.

        A cache of a sliding window loses the tokens that have left it, and removes its end all the same
        (llama_kv_cache::seq_rm in src/llama-kv-cache.cpp); llama-server makes this check, too.
        """
        if self._llm._is_recurrent or self._llm._is_hybrid:
            return False
        window = self._api.llama_model_n_swa(self._llm._model.model)
        return self._n_gone() <= max(0, int(length + 1 - window))

    def _n_gone(self) -> int:
        """Number of tokens that have left a sliding window and are no longer in its cache."""
        if self._api.llama_model_n_swa(self._llm._model.model) == 0 or self._llm.n_tokens == 0:
            return 0
        memory = self._api.llama_get_memory(self._llm._ctx.ctx)
        return int(self._api.llama_memory_seq_pos_min(memory, 0))

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
        llm, foreign = self._llm, self._cached.foreign
        cached: list[int] = llm.input_ids[: llm.n_tokens].tolist()
        length = self._end_of_alike(range(self._cached.n_prefix))
        goes_on = bool(foreign) and prompt[: len(cached)] == cached
        if foreign and not goes_on:
            length = min(length, foreign.start)
        same = (ours == theirs for ours, theirs in zip(cached[:length], prompt, strict=False))
        length = next((at for at, equal in enumerate(same) if not equal), min(length, len(prompt)))
        # A last token whose logits are gone is computed again, as by `Llama.generate`.
        if length == len(prompt) and (length < len(cached) or llm._requires_eval):
            length -= 1
        is_cut = length < len(cached)
        if goes_on and (length < foreign.stop or (is_cut and not self._can_go_on_from(length))):
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
            with self._computing():
                try:
                    token = tokens.send(sent)
                except StopIteration:
                    return
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
        self._note(range(first, first + len(tokens)))
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
        try:
            with self._computing():
                return self._original["embed"](*args, **kwargs)
        finally:
            for control, positions in zip(self.controls, steered, strict=True):
                control.steer(positions)

    def _reset(self) -> None:
        self._original["reset"]()
        self._cached.n_tokens = self._cached.n_prefix = 0
        self._cached.foreign = range(0)
        if not self._computes and self._llm.chat_handler is not None:
            self._begin_part()

    def _save_state(self) -> Any:
        """Save a state, whole for these controls, that ends before the first steered token for others."""
        state = self._original["save_state"]()
        self._take_stock()
        cached = self._cached
        setattr(state, _ATTRIBUTE, _Saved(self._digests(), copy.copy(cached), copy.copy(state)))
        unsteered = 0 if any(cached.strengths) else cached.n_prefix
        if cached.foreign:
            unsteered = min(unsteered, cached.foreign.start)
        if unsteered < state.n_tokens and not self._can_go_on_from(unsteered):
            unsteered = 0  # such a state cannot be cut in the middle
        state.n_tokens, state.scores = unsteered, state.scores[:unsteered]
        return state

    def _load_state(self, state: Any) -> None:
        saved: _Saved | None = getattr(state, _ATTRIBUTE, None)
        if saved is not None and saved.digests == self._digests():
            self._original["load_state"](saved.state)
            self._cached = copy.copy(saved.cached)
            return
        self._original["load_state"](state)
        self._cached = self._unsteered(state.n_tokens)
        if saved is not None:
            self._cached.foreign = range(0)  # it ends before them

    def _digests(self) -> tuple[str, ...]:
        return tuple(control.digest for control in self.controls)
