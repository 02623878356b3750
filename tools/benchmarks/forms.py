"""The forms in which an edit reaches a context of llama.cpp."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from alignez_gguf.control.edits import Edits
    from alignez_gguf.control.model_info import ModelInfo
    from alignez_gguf.runtime.context import Context

_STRENGTHS = (0.5, 0.75, 1.0)


class Form(Protocol):
    """A form of an edit on a context, which is steered within the block."""

    def __enter__(self) -> object:
        """From the next decode on, every token is steered, or those that the form means."""
        ...

    def __exit__(self, *_: object) -> None:
        """The context is as if it had never been steered."""
        ...

    def before_token(self) -> None:
        """Called before each token that is decoded; its time counts."""
        ...


class NoEdit:
    """Nothing: what two runs differ by for no reason."""

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None: ...

    def before_token(self) -> None: ...


class Patch(NoEdit):
    """The patch, at strength 1 from position `first` on."""

    def __init__(self, context: Context, edits: Edits, first: int = 0) -> None:
        self._context = context
        self._edits = edits
        self._first = first

    def __enter__(self) -> object:
        from alignez_gguf.runtime import bindings

        bindings.set_edits(self._context.pointer, self._edits)
        bindings.set_strength(self._context.pointer, 1.0, first=self._first)
        return self

    def __exit__(self, *_: object) -> None:
        from alignez_gguf.runtime import bindings

        bindings.set_edits(self._context.pointer, {})


class ChangingStrength(Patch):
    """The patch, with another strength for every token."""

    def __init__(self, context: Context, edits: Edits) -> None:
        super().__init__(context, edits)
        self._strengths = itertools.cycle(_STRENGTHS)

    def before_token(self) -> None:
        from alignez_gguf.runtime import bindings

        bindings.set_strength(self._context.pointer, next(self._strengths))


class BaseAndSteered(Patch):
    """The patch on all sequences of a context but the first."""

    def __enter__(self) -> object:
        from alignez_gguf.runtime import bindings

        super().__enter__()
        bindings.set_strength(self._context.pointer, 0.0, sequence=0)
        return self


class Stock(NoEdit):
    """What any llama.cpp takes: a LoRA that removes, or a control vector that adds."""

    def __init__(
        self,
        context: Context,
        *,
        lora: Path | None = None,
        additions: Mapping[int, NDArray[np.float32]] | None = None,
    ) -> None:
        self._context = context
        self._lora = lora
        self._additions = additions or {}

    def __enter__(self) -> object:
        from alignez_gguf.steering.stock_adapters import StockAdapters

        self._adapters = StockAdapters(
            self._context.pointer,
            self._context.model.pointer,
            lora=self._lora,
            additions=self._additions,
        )
        self._adapters.steer(1.0, range(1))
        return self

    def __exit__(self, *_: object) -> None:
        self._adapters.detach()


def removal(info: ModelInfo, rank: int) -> Edits:
    """Random orthonormal directions, removed at every layer."""
    import numpy as np

    from alignez_gguf.control.edits import LayerEdit

    rng = np.random.default_rng(rank)
    return {
        layer: LayerEdit(remove=rng.standard_normal((rank, info.n_embd)).astype(np.float32))
        for layer in range(info.n_layer)
    }


def additions(info: ModelInfo) -> dict[int, NDArray[np.float32]]:
    """A small random vector for every layer that a stock control vector reaches: all but the first."""
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        layer: (0.01 * rng.standard_normal(info.n_embd)).astype(np.float32)
        for layer in range(1, info.n_layer)
    }
