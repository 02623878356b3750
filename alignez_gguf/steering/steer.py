"""`steer`: a control file on a `llama_cpp.Llama` that a script already has, and the handle it gives."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import check_strength
from alignez_gguf.control.scope import Scope
from alignez_gguf.errors import AlignezError, RuntimeUnavailableError, SteeringError
from alignez_gguf.runtime import bindings
from alignez_gguf.steering.handle import SteeringHandle
from alignez_gguf.steering.llama_hooks import AttachedControl, LlamaHooks
from alignez_gguf.steering.patched import Patched, SteeringBackend
from alignez_gguf.steering.stock_adapters import attach

Runtime = Literal["auto", "patched", "stock"]


def steer(
    llm: Any,
    control: ControlFile | str | PathLike[str],
    *,
    strength: float = 1.0,
    scope: str | Scope | None = None,
    runtime: Runtime = "auto",
) -> Steering:
    """Steer a `llama_cpp.Llama` until the returned handle is removed.

    At strength s the MLP output of an edited layer becomes x - s V^T V x, and s times the addition is added
    to the output of its block; 0 is bit for bit the original model.

    A model that is steered already can be steered again: the controls act one after the other, in the order
    in which they were attached, each with its own strength and scope, and are removed in any order. What is
    left is bit for bit what the others give alone. It takes the patch.

    Args:
        llm: the model to steer.
        control: a control file, or its path.
        strength: finite and not negative.
        scope: "generation" (the last prompt token and every generated one), "all" tokens, or "first:N".
            Default: what the control file was chosen for, else "generation".
        runtime: "patched" needs the patched llama-cpp-python. "stock" does with any: it makes adapters from
            the model's file and keeps them in the cache; it cannot add at layer 0, and computes a prompt in
            two decodes where the scope begins at its last token. "auto" is "patched" where that reaches the
            model, else "stock".

    Returns:
        A handle that is also a context manager.

    Raises:
        ControlFileError: the file is malformed or made for another model.
        RuntimeUnavailableError: the installed llama-cpp-python lacks the patch, and the edit needs it.
        SteeringError: the model is closed, it cannot be edited there, it cannot take another control, or the
            strength or scope is not valid.
    """
    if runtime not in ("auto", "patched", "stock"):
        raise SteeringError(f"the runtime {runtime!r} is unknown; use auto, patched or stock")
    if not isinstance(control, ControlFile):
        control = ControlFile.load(control)
    chosen = control.scope if scope is None else Scope.parse(scope)
    return Steering(llm, control, check_strength(strength), chosen, runtime)


class Steering(SteeringHandle):
    """The handle of a control on a `llama_cpp.Llama`."""

    def __init__(
        self,
        llm: Any,
        control: ControlFile,
        strength: float,
        scope: Scope,
        runtime: Runtime,
    ) -> None:
        self._hooks = LlamaHooks.of(llm)
        if self._hooks.is_closed:
            raise SteeringError("the model is closed; load it again to steer it")
        control.check_fits(ModelInfo.from_llama(llm))
        if control.gate is not None:
            control.gate.check_fits(llm.n_vocab())
        backend = _backend(llm, control, runtime, [attached.backend for attached in self._hooks.controls])
        self._attached = AttachedControl(control, strength, scope, backend)
        super().__init__(control, self._attached)
        self._hooks.attach(self._attached)

    @property
    def runtime(self) -> Literal["patched", "stock"]:
        """The way in which the edits reach llama.cpp: the patch, or adapters of any version."""
        return "patched" if isinstance(self._attached.backend, Patched) else "stock"

    def remove(self) -> None:
        """Give the model back without this control; the cache keeps what it did not steer. Idempotent."""
        if self._attached in self._hooks.controls:
            self._hooks.detach(self._attached)

    def _apply_strength(self) -> None:
        self._attached.steer(self._attached.positions)

    def _require_attached(self) -> None:
        if self._attached not in self._hooks.controls or self._hooks.is_closed:
            raise SteeringError("this steering was removed, or its model closed; call steer() again")


def _backend(
    llm: Any, control: ControlFile, runtime: Runtime, nest: Sequence[SteeringBackend]
) -> SteeringBackend:
    """Set the edits by the requested runtime; for "auto", by adapters where the patch cannot.

    Args:
        nest: the backends of the controls that steer the model already.
    """
    if nest:
        return _nested(llm, control, runtime, nest[-1])
    bindings.require_supported()
    if runtime == "stock":
        return _adapters(llm, control)
    if runtime == "auto" and not bindings.is_patched():
        try:
            return _adapters(llm, control)
        except SteeringError as error:
            raise RuntimeUnavailableError(
                f"the installed llama-cpp-python lacks the steering patch, and without it: {error}"
            ) from error
    try:
        return Patched(llm._ctx.ctx, control.edits)
    except SteeringError as out_of_reach:
        if runtime == "patched":
            raise
        try:
            return _adapters(llm, control)
        except AlignezError:
            raise out_of_reach from None


def _nested(llm: Any, control: ControlFile, runtime: Runtime, other: SteeringBackend) -> SteeringBackend:
    # LoRAs add up: two removals would miss s1 s2 P2 P1 x
    if runtime == "stock" or not isinstance(other, Patched):
        raise SteeringError(
            "the adapters of stock llama.cpp steer by one control at a time; remove the other one first, or "
            "use the patched runtime for both: alignez-gguf runtime build"
        )
    return Patched(llm._ctx.ctx, control.edits, beside=other)


def _adapters(llm: Any, control: ControlFile) -> SteeringBackend:
    if llm.lora_path:
        raise SteeringError(
            "the model was loaded with a LoRA of its own, which the adapters of stock llama.cpp cannot take "
            "into account; load it without, or use the patched runtime: alignez-gguf runtime build"
        )
    return attach(llm._ctx.ctx, llm._model.model, llm.model_path, control.edits)
