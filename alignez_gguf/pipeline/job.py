"""What a job is given: the model, the templates, the settings, and where it works."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from alignez_gguf.control.edits import Edits
from alignez_gguf.control.gate import Gate
from alignez_gguf.control.scope import Scope
from alignez_gguf.engines.base import Engine, Generator, Passage
from alignez_gguf.progress import Reporter
from alignez_gguf.prompts.templates import SAFETY, Templates
from alignez_gguf.readout import Hook, ReadingPosition
from alignez_gguf.selection.scoring import SteeredModel
from alignez_gguf.selection.search import DEFAULT_BUDGET
from alignez_gguf.storage.workdir import WorkDirectory

Recipe = Literal["auto", "paper"]


@dataclass(frozen=True)
class Aspect:
    """What is to become better, by the name of its personas, and how much of its edit is taken."""

    name: str = SAFETY
    weight: float = 1.0


@dataclass(frozen=True)
class Settings:
    """What decides a control file, besides the model, the queries and the templates.

    Attributes:
        recipe: `auto` chooses without labels; `paper` is AlignEZ to the letter.
        seed: of every draw.
        method: only this one; `None` tries all.
        reading: only this position; `None` tries all.
        hook: only what is read here; `None` tries all.
        layers: only these may be edited; `None` is all.
        threshold: of the paper's decision rule.
        kl_budget: nat per token, for `auto`.
        scope: the time steps that are edited, for `auto`; `None` is the whole answer.
        max_tokens: of an answer, at most.
        samples: self-generated pairs for each query.
        aspects: one or several.
        gate: steer only requests for which a gate opens, where one can be fitted; for `auto` and one aspect.
        force: go on where the personas show no contrast to amplify.
        choose: a row of the table of the selection instead of the best one, counted from 1.
    """

    recipe: Recipe = "auto"
    seed: int = 0
    method: str | None = None
    reading: ReadingPosition | None = None
    hook: Hook | None = None
    layers: tuple[int, ...] | None = None
    threshold: float = 0.5
    kl_budget: float = DEFAULT_BUDGET
    scope: Scope | None = None
    max_tokens: int | None = None
    samples: int = 1
    aspects: tuple[Aspect, ...] = (Aspect(),)
    choose: int | None = None
    gate: bool = True
    force: bool = False


class EditScoringEngine(Engine, Protocol):
    """An engine that can also measure edits of its model."""

    def steered(self, passages: Sequence[Passage]) -> AbstractContextManager[SteeredModel]:
        """The likelihood of answers to plain prompts under many edits.

        Raises:
            QueryError: a prompt is too short, or an answer empty.
            RuntimeUnavailableError: the runtime cannot steer.
        """
        ...


@runtime_checkable
class SteeredGenerator(Generator, Protocol):
    """An engine that can also write under an edit."""

    def set_edits(self, edits: Edits, scope: Scope = ..., gate: Gate | None = None) -> None:
        """Edit what is generated at a strength above 0, where a gate opens; no edits end that."""
        ...


@dataclass(frozen=True)
class Job:
    """One run of the main job.

    Attributes:
        engine: runs the model whose embeddings are read.
        templates: how the model is asked, in one aspect.
        settings: what else decides the result.
        work: keeps what is done for a later run.
        reporter: told of the progress.
        target: runs the model that the edits are for: the same one, or another file of it.
        generator: writes the pairs: the same model, perhaps elsewhere.
    """

    engine: Engine
    templates: Templates
    settings: Settings
    work: WorkDirectory
    reporter: Reporter
    target: EditScoringEngine
    generator: Generator
