"""A `llama_cpp.Llama` that is steered from the beginning, for scripts that want one object."""

from __future__ import annotations

from os import PathLike
from types import TracebackType
from typing import Any

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.scope import Scope
from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.steering.steer import Runtime, Steering, steer

try:
    from llama_cpp import Llama
except (ImportError, OSError, RuntimeError) as error:
    raise RuntimeUnavailableError(
        f"llama-cpp-python cannot be loaded ({error}); run: alignez-gguf runtime build"
    ) from error


class SteeredLlama(Llama):  # type: ignore[misc]
    """A `Llama` whose every answer is steered; a context manager.

    Args:
        model_path: the GGUF file.
        control, strength, scope, runtime: as `steer` takes them.
        options: everything else that `Llama` takes; `verbose` is off unless it is given.

    Raises:
        AlignezError: as `steer` does.
        ValueError: llama.cpp cannot load the model.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        control: ControlFile | str | PathLike[str],
        *,
        strength: float = 1.0,
        scope: str | Scope | None = None,
        runtime: Runtime = "auto",
        **options: Any,
    ) -> None:
        self._own_steering: Steering | None = None
        super().__init__(str(model_path), **{"verbose": False, **options})
        try:
            self._own_steering = steer(self, control, strength=strength, scope=scope, runtime=runtime)
        except BaseException:
            self.close()
            raise

    @property
    def steering(self) -> Steering:
        """The handle: `strength` and `scope` can be changed, `remove()` gives the unsteered model back."""
        if self._own_steering is None:
            raise ValueError("the model is closed")
        return self._own_steering

    @property
    def strength(self) -> float:
        """How much of the edit is applied; a change holds from the next token on."""
        return self.steering.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.steering.strength = value

    def close(self) -> None:
        """Free the model. Idempotent."""
        steering, self._own_steering = getattr(self, "_own_steering", None), None
        if steering is not None:
            steering.remove()
        super().close()

    def __enter__(self) -> SteeredLlama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
