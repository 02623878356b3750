"""Projects queries on the edited direction, before and after the edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.engines.base import Engine, Passage
from alignez_gguf.readout import Hook, Readout


@dataclass(frozen=True, eq=False)
class Projections:
    """The residual stream at the end of a block, at the last token of each prompt, along one direction.

    Attributes:
        layer: the first edited layer. Below it nothing is steered, so `after` is exact where the
            MLP output goes into the residual stream unchanged.
        before, after: float64 [n_queries].
    """

    layer: int
    before: NDArray[np.float64]
    after: NDArray[np.float64]


def project(engine: Engine, control: ControlFile, prompts: Sequence[str], strength: float) -> Projections:
    """Project the residual stream r on v: what the first edited layer removes first, or else what it adds.

    With MLP output x, strength s, gain g of v (-1 for a removal) and a all that is added: before <r, v>,
    after <r, v> + s g <x, v> + s <a, v>, where the term of x is left out without a removal. Where a gate
    stays closed, both are the same.

    Raises:
        ModelFileError: the engine cannot read the architecture.
    """
    layer, edit = next(iter(control.edits.items()))
    passages = [Passage(prompt) for prompt in prompts]
    addition = np.zeros(control.model.n_embd)
    for added in (edit.add, edit.bias):
        addition = addition if added is None else addition + added
    direction = (
        addition / max(edit.scale, np.finfo(np.float64).tiny) if edit.remove is None else edit.remove[0]
    )

    hooks: Sequence[Hook] = ("residual",) if edit.remove is None else ("residual", "mlp")
    outputs = engine.activations(passages, list(map(Readout, hooks)))
    along = np.array([output[:, layer].astype(np.float64) @ direction for output in outputs])
    before = along[:, 0]
    after = before + strength * float(addition @ direction)
    if edit.remove is not None:
        after = after + strength * float(edit.gains[0]) * along[:, 1]
    if control.gate is not None:
        opens = np.fromiter(map(control.gate.opens, engine.next_token_logprobs(prompts)), bool)
        after = np.where(opens, after, before)
    return Projections(layer, before, after)
