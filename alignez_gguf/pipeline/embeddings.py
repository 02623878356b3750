"""How the model embeds pairs, at one place or several; what an earlier run has read is not read again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from alignez_gguf.activations import Activations, ForeignArraysError, ReadingPosition
from alignez_gguf.engines import Hook, Passage, Readout
from alignez_gguf.generation import answer_prompts, answered
from alignez_gguf.model_info import ModelInfo
from alignez_gguf.pairs import PreferencePair, unweighted
from alignez_gguf.pipeline.job import Job


class Place(NamedTuple):
    """Where a pair is embedded: at which tokens, and in which output of a layer."""

    reading: ReadingPosition
    hook: Hook

    def __str__(self) -> str:
        return ", ".join(self)

    @property
    def readout(self) -> Readout:
        return Readout(self.hook, "mean" if self.reading == "response-mean" else "last")


class Embeddings:
    """The embeddings of both sides of all pairs at several places.

    Places in the same texts are read together, when the first of them is asked for.

    Args:
        job: whose engine reads, and whose work directory keeps what it reads.
        pairs: in the order of the rows.
        places: that will be asked for.
    """

    def __init__(self, job: Job, pairs: Sequence[PreferencePair], places: Sequence[Place]) -> None:
        self.job = job
        self.pairs = pairs
        self._places = tuple(dict.fromkeys(places))
        self._read: dict[Place, Activations] = {}

    def at(self, place: Place) -> Activations:
        """What every layer makes of the pairs at one of the places."""
        if place not in self._read:
            together = [one for one in self._places if _in_prompt(one) == _in_prompt(place)]
            self._read |= self._complete({one: self._opened(one) for one in together})
        return self._read[place]

    def _complete(self, opened: Mapping[Place, Activations]) -> Mapping[Place, Activations]:
        """The same with every row; those that are missing anywhere are read in one pass."""
        lacking = {place: found for place, found in opened.items() if not found.done.all()}
        if not lacking:
            return opened
        missing = [
            row for row in range(len(self.pairs)) if not all(found.done[row] for found in lacking.values())
        ]
        in_prompt = _in_prompt(next(iter(lacking)))
        passages = list(chain.from_iterable(self._passages(self.pairs[row], in_prompt) for row in missing))
        title = f"reading activations ({'; '.join(map(str, lacking))})"
        with self.job.reporter.stage(title, len(self.pairs)) as advance:
            advance(len(self.pairs) - len(missing))
            outputs = self.job.engine.activations(passages, [place.readout for place in lacking])
            for row, helpful, harmful in zip(missing, outputs, outputs, strict=True):
                for activations, *sides in zip(lacking.values(), helpful, harmful, strict=True):
                    if not activations.done[row]:
                        activations.write(row, *sides)
                advance(1)
        return opened

    def _opened(self, place: Place) -> Activations:
        info = self.job.engine.info
        folder = self.job.work.part(
            "activations",
            model=info,
            templates=self.job.templates,
            pairs=unweighted(self.pairs),
            reading=place.reading,
            hook=place.hook,
        )
        return _opened_activations(info, len(self.pairs), folder)

    def _passages(self, pair: PreferencePair, in_prompt: bool) -> Sequence[Passage]:
        """The helpful side and the harmful one."""
        if in_prompt:
            return [Passage(prompt) for prompt in answer_prompts(self.job.templates, pair)]
        return answered(self.job.templates, pair)


def _in_prompt(place: Place) -> bool:
    """Whether a place lies in the prompts that ask the personas, and not in the answers."""
    return place.reading == "prompt"


def _opened_activations(model: ModelInfo, n_pairs: int, folder: Path) -> Activations:
    """What an earlier run has read; nothing where its files are damaged beyond telling the rows."""
    shape = (model.n_layer, n_pairs, model.n_embd)
    try:
        return Activations(*shape, folder)
    except ForeignArraysError:  # the name of the folder says whose it is, so this is damage
        warnings.warn(f"{folder} is damaged and is made again; check the disk", stacklevel=5)
        shutil.rmtree(folder, ignore_errors=True)
        return Activations(*shape, folder)
