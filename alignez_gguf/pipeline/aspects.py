"""Several aspects in one control file: removals span one subspace together, additions are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from alignez_gguf.control.edits import Edits, LayerEdit
from alignez_gguf.control.scope import GENERATION
from alignez_gguf.errors import NoGainError, SteeringError
from alignez_gguf.pipeline.job import Aspect, Job
from alignez_gguf.pipeline.recipes import RecipeResult
from alignez_gguf.pipeline.stages import open_scorer
from alignez_gguf.selection.scoring import EditScore

_SMALLER = 0.7
"""Factor by which all additions shrink while the whole is over the budget."""
_MOST_SHRINKS = 8


@dataclass(frozen=True)
class Tradeoff:
    """What an aspect gains by its own edit alone, and by that of all aspects together."""

    aspect: Aspect
    alone: EditScore
    together: EditScore


def combine(parts: Sequence[tuple[Mapping[int, LayerEdit], float]]) -> dict[int, LayerEdit]:
    """One edit from several, each with the weight of its additions.

    A layer removes the span of all that is removed there, in the order of the parts, and adds the weighted
    sum of what is added. A weight of 0 leaves a part out.

    Raises:
        SteeringError: a part boosts, or adds to the MLP output.
    """
    parts = [(edits, weight) for edits, weight in parts if weight > 0]
    combined = {}
    for layer in sorted({layer for edits, _ in parts for layer in edits}):
        here = [(edits[layer], weight) for edits, weight in parts if layer in edits]
        if any(edit.gain is not None or edit.bias is not None for edit, _ in here):
            raise SteeringError("edits that boost, or add to the MLP output, cannot be combined")
        removed = [edit.remove for edit, _ in here if edit.remove is not None]
        added = [np.float32(weight) * edit.add for edit, weight in here if edit.add is not None]
        combined[layer] = LayerEdit(
            add=np.sum(np.stack(added), axis=0) if added else None,
            remove=np.concatenate(removed) if removed else None,
        )
    return combined


def combine_within_budget(
    jobs: Sequence[Job], made: Sequence[RecipeResult]
) -> tuple[dict[int, LayerEdit], list[Tradeoff], float]:
    """The edit of all aspects whose divergence every aspect affords, each aspect's figures, and the scale.

    Where the whole costs more than the budget, all additions are scaled down alike.

    Raises:
        NoGainError: no scale is within the budget.
    """
    aspects = [job.settings.aspects[0] for job in jobs]
    scope = jobs[0].settings.scope or GENERATION
    with ExitStack() as opened:
        scored_by = [
            opened.enter_context(open_scorer(job, one.held_out)) for job, one in zip(jobs, made, strict=True)
        ]

        def scores(edits: Edits) -> list[EditScore]:
            return [scorer.score(edits, scope=scope) for scorer in scored_by]

        alone = [
            scorer.score(combine([(part.edits, aspect.weight)]), scope=scope)
            for scorer, part, aspect in zip(scored_by, made, aspects, strict=True)
        ]
        scale = 1.0
        for _ in range(_MOST_SHRINKS):
            edits = combine(
                [(part.edits, scale * aspect.weight) for part, aspect in zip(made, aspects, strict=True)]
            )
            together = scores(edits)
            budget = jobs[0].settings.kl_budget
            if all(found.kl is not None and found.kl <= budget for found in together):
                tradeoffs = map(Tradeoff, aspects, alone, together)
                return edits, list(tradeoffs), scale
            scale *= _SMALLER
    raise NoGainError(
        f"the aspects together cost more than {budget:g} nat per token at any scale; raise --kl-budget, or "
        "export them apart"
    )
