"""Steering a `llama_cpp.Llama` that a script already has.

Every answer of `Llama` goes through its `generate` and `eval`, which are replaced on the instance while it
is steered. Its cache of keys and values survives a change of edit or strength (`Llama.generate` in
llama_cpp/llama.py reuses the longest common prefix whatever the adapters are), so this module keeps for
every cached token the strength it was computed under, and drops what another request may not reuse.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control import ControlFile, ModelInfo
from alignez_gguf.edits import Edits, check_strength
from alignez_gguf.errors import SteeringError
from alignez_gguf.runtime import library
from alignez_gguf.scope import Scope

Runtime = Literal["auto", "patched"]

_ATTRIBUTE = "_alignez_steering"
_REPLACED = ("generate", "eval", "embed", "save_state", "load_state")


def steer(
    llm: Any,
    control: ControlFile | str | PathLike[str],
    *,
    strength: float = 1.0,
    scope: str | Scope = "generation",
    runtime: Runtime = "auto",
) -> Steering:
    """Steer a `llama_cpp.Llama` until the returned handle is removed.

    At strength s the MLP output of an edited layer becomes x - s V^T V x, and s times the addition is added
    to the output of its block; 0 is bit for bit the original model.

    Args:
        llm: the model to steer.
        control: a control file, or its path.
        strength: finite and not negative.
        scope: "generation" (the last prompt token and every generated one), "all" tokens, or "first:N".
        runtime: "patched" or "auto"; both need the patched llama-cpp-python.

    Returns:
        A handle that is also a context manager.

    Raises:
        ControlFileError: the file is malformed or made for another model.
        RuntimeUnavailableError: the installed llama-cpp-python lacks the patch.
        SteeringError: the model is closed or already steered, it cannot be edited there, or the strength or
            scope is not valid.
    """
    if runtime not in ("auto", "patched"):
        raise SteeringError(f"the runtime {runtime!r} is unknown; use auto or patched")
    library.require_patched()
    if not isinstance(control, ControlFile):
        control = ControlFile.load(control)
    return Steering(llm, control, check_strength(strength), Scope.parse(scope))


@dataclass(frozen=True)
class _Saved:
    """The part of a saved state that only the same edits may go on from."""

    edits_digest: str
    strengths: tuple[float, ...]
    """Of every token that was cached."""
    scores: NDArray[np.float32]
    """`LlamaState.scores` of all of them."""


class Steering:
    """A steered model. Leaving the `with` block, or `remove()`, gives the original model back."""

    def __init__(self, llm: Any, control: ControlFile, strength: float, scope: Scope) -> None:
        if _is_closed(llm):
            raise SteeringError("the model is closed; load it again to steer it")
        if _ATTRIBUTE in vars(llm):
            raise SteeringError("the model is already steered; remove the other control first")
        control.check_fits(ModelInfo.from_llama(llm))
        self.control = control
        self._llm = llm
        self._strength = strength
        self._scope = scope
        self._steered: range = range(0)
        """Positions that are steered in the present request."""
        self._in_generate = False
        self._edits_digest = _digest(control.edits)
        self._cached: list[float] = [0.0] * llm.n_tokens
        """Strength that each cached token was computed under."""
        library.set_edits(self._context, control.edits, control.model.n_embd)
        self._set_positions(range(0))
        self._original: dict[str, Callable[..., Any]] = {name: getattr(llm, name) for name in _REPLACED}
        self._generate_signature = inspect.signature(llm.generate)
        for name in _REPLACED:
            setattr(llm, name, getattr(self, f"_{name}"))
        setattr(llm, _ATTRIBUTE, self)

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def strength(self) -> float:
        """How much of the edit is applied; a change holds from the next token on."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._require_attached()
        self._strength = check_strength(value)
        self._set_positions(self._steered)

    @property
    def scope(self) -> Scope:
        """Which tokens are steered; a change holds from the next request on."""
        return self._scope

    @scope.setter
    def scope(self, value: str | Scope) -> None:
        self._require_attached()
        self._scope = Scope.parse(value)

    def remove(self) -> None:
        """Give the original model back; its cache keeps only what was not steered. Idempotent."""
        llm = self._llm
        if vars(llm).get(_ATTRIBUTE) is not self:
            return
        for name in (*_REPLACED, _ATTRIBUTE):
            delattr(llm, name)
        if not _is_closed(llm):
            self._keep_prefix(self._reusable(range(0)))
            library.set_edits(self._context, {}, self.control.model.n_embd)

    @property
    def _context(self) -> Any:
        return self._llm._ctx.ctx

    def _require_attached(self) -> None:
        if vars(self._llm).get(_ATTRIBUTE) is not self or _is_closed(self._llm):
            raise SteeringError("this steering was removed, or its model closed; call steer() again")

    def _set_positions(self, positions: range) -> None:
        self._steered = positions
        library.set_strength(self._context, 0.0)
        if positions and self._strength > 0:
            library.set_strength(
                self._context, self._strength, sequence=0, first=positions.start, end=positions.stop
            )

    def _begin(self, n_prompt: int) -> None:
        """Start a request whose prompt ends at position `n_prompt`."""
        first, end = self._scope.positions(n_prompt)
        self._set_positions(range(first, self._llm.n_ctx() if end is None else end))

    def _reusable(self, steered: range) -> int:
        """Number of cached tokens, from the start, that `steered` positions would compute the same."""
        for position, strength in enumerate(self._cached[: self._llm.n_tokens]):
            if strength != (self._strength if position in steered else 0.0):
                return position
        return int(self._llm.n_tokens)

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
            self._keep_prefix(self._reusable(self._steered))
        tokens = self._original["generate"](*bound.args, **bound.kwargs)
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
            self._require_attached()

    def _eval(self, tokens: Sequence[int]) -> None:
        first = self._llm.n_tokens
        if not self._in_generate and (first == 0 or len(tokens) > 1):
            self._begin(first + len(tokens))
        self._cached[first:] = [
            self._strength if position in self._steered else 0.0
            for position in range(first, first + len(tokens))
        ]
        self._original["eval"](tokens)

    def _embed(self, *args: Any, **kwargs: Any) -> Any:
        steered = self._steered
        self._set_positions(range(0))
        try:
            return self._original["embed"](*args, **kwargs)
        finally:
            self._set_positions(steered)

    def _save_state(self) -> Any:
        """Save a state that is whole for these edits, and ends before the first steered token for others."""
        state = self._original["save_state"]()
        strengths = tuple(self._cached[: state.n_tokens])
        setattr(state, _ATTRIBUTE, _Saved(self._edits_digest, strengths, state.scores))
        unsteered = self._reusable(range(0))
        if unsteered < state.n_tokens and (self._llm._is_recurrent or self._llm._is_hybrid):
            unsteered = 0  # such a state cannot be cut in the middle
        state.n_tokens, state.scores = unsteered, state.scores[:unsteered]
        return state

    def _load_state(self, state: Any) -> None:
        saved = getattr(state, _ATTRIBUTE, None)
        strengths = (0.0,) * state.n_tokens
        if saved is not None and saved.edits_digest == self._edits_digest:
            strengths = saved.strengths
            state = copy.copy(state)
            state.n_tokens, state.scores = len(strengths), saved.scores
        self._original["load_state"](state)
        self._cached = list(strengths)


def _digest(edits: Edits) -> str:
    digest = hashlib.sha256()
    for layer, edit in sorted(edits.items()):
        for array in (edit.remove, edit.add):
            digest.update(f"{layer} {None if array is None else array.shape} ".encode())
            digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _is_closed(llm: Any) -> bool:
    return getattr(llm._ctx, "ctx", None) is None
