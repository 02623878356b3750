"""How the model embeds pairs, at one place or several; what has been read of a text is not read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.engines.base import Passage
from alignez_gguf.pairs.generation import answer_prompts, answered
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline.job import Job
from alignez_gguf.pipeline.verdicts import own_contrast, persona_contrast
from alignez_gguf.readout import Hook, ReadingPosition, Readout
from alignez_gguf.storage.activation_store import ActivationStore, StoredLayers


class ActivationSite(NamedTuple):
    """Where a contrast is read: at which tokens of which texts, and in which output of a layer."""

    reading: ReadingPosition
    hook: Hook

    def __str__(self) -> str:
        return ", ".join(self)

    @property
    def in_prompt(self) -> bool:
        """Whether it lies in the prompts that ask the personas."""
        return self.reading == "prompt"

    @property
    def contrasts_verdicts(self) -> bool:
        """Whether it tells apart what is declined and what is not, instead of the personas."""
        return self.reading in ("verdict", "refusal")

    def shares_texts_with(self, other: ActivationSite) -> bool:
        """Whether it lies in the same texts as another place."""
        readings = {self.reading, other.reading}
        return len(readings) == 1 or readings == {"response", "response-mean"}

    @property
    def readout(self) -> Readout:
        return Readout(self.hook, "mean" if self.reading == "response-mean" else "last")


class PairActivations(NamedTuple):
    """Both sides of a contrast, [n_layer, n_pairs, n_embd] each."""

    helpful: StoredLayers
    harmful: StoredLayers


class ActivationCache:
    """What has been read of texts at some places, all of which lie in the same texts.

    Args:
        stores: where it is kept.
    """

    def __init__(self, stores: Mapping[ActivationSite, ActivationStore]) -> None:
        self._stores = stores

    @classmethod
    def open(cls, job: Job, sites: Sequence[ActivationSite]) -> ActivationCache:
        """Those in the work directory of a job."""
        model = job.engine.info
        return cls(
            {
                site: ActivationStore(
                    job.work.part(
                        "activations", model=model, reading=site.reading, hook=site.hook
                    ).with_suffix(".f16"),
                    model.n_layer,
                    model.n_embd,
                )
                for site in dict.fromkeys(sites)
            }
        )

    @property
    def sites(self) -> Sequence[ActivationSite]:
        return list(self._stores)

    @property
    def readouts(self) -> Sequence[Readout]:
        return [site.readout for site in self._stores]

    def __contains__(self, text: Passage) -> bool:
        """Whether it has been read at every place."""
        return all(_name(text) in store for store in self._stores.values())

    def keep(self, text: Passage, values: NDArray[np.float16]) -> None:
        """Keep what was read of a text, [n_places, n_layer, n_embd], where it is not there yet."""
        for store, read in zip(self._stores.values(), values, strict=True):
            if _name(text) not in store:
                store.write(_name(text), read)

    def missing_sites(self, texts: Sequence[Passage]) -> ActivationCache:
        """Only the places at which one of these texts has not been read."""
        names = list(map(_name, texts))
        return ActivationCache(
            {site: store for site, store in self._stores.items() if not all(name in store for name in names)}
        )

    def at(self, site: ActivationSite, texts: Sequence[Passage]) -> StoredLayers:
        """What every layer makes of these texts at one of the places."""
        return self._stores[site].of(map(_name, texts))


class Embeddings:
    """The embeddings of both sides of all pairs at several places.

    Places in the same texts are read together, when the first of them is asked for.

    Args:
        job: whose engine reads, and whose work directory keeps what it reads.
        pairs: in the order of the rows.
        places: that will be asked for.
    """

    def __init__(self, job: Job, pairs: Sequence[PreferencePair], sites: Sequence[ActivationSite]) -> None:
        self.job = job
        self.pairs = pairs
        self._sites = tuple(dict.fromkeys(sites))
        self._read: dict[ActivationSite, PairActivations] = {}

    def at(self, site: ActivationSite) -> PairActivations:
        """What every layer makes of the pairs at one of the places."""
        if site not in self._read:
            together = [one for one in self._sites if one.shares_texts_with(site)]
            helpful, harmful = self._sides(site)
            readings = ActivationCache.open(self.job, together)
            self._complete(readings, list(dict.fromkeys([*helpful, *harmful])))
            self._read |= {
                one: PairActivations(readings.at(one, helpful), readings.at(one, harmful)) for one in together
            }
        return self._read[site]

    def _sides(self, site: ActivationSite) -> tuple[Sequence[Passage], Sequence[Passage]]:
        """The texts of the helpful and of the harmful sides."""
        if site.contrasts_verdicts:
            plain = self.job.templates.plain_prompt
            own = site.reading == "refusal"
            both = own_contrast(self.job, self.pairs) if own else persona_contrast(self.pairs)
            return [Passage(plain(yes)) for yes, _ in both], [Passage(plain(no)) for _, no in both]
        if site.in_prompt:
            prompts = [answer_prompts(self.job.templates, pair) for pair in self.pairs]
            return [Passage(helpful) for helpful, _ in prompts], [Passage(harmful) for _, harmful in prompts]
        answers = [answered(self.job.templates, pair) for pair in self.pairs]
        return [helpful for helpful, _ in answers], [harmful for _, harmful in answers]

    def _complete(self, readings: ActivationCache, texts: Sequence[Passage]) -> None:
        """Read the texts that are missing anywhere, in one pass."""
        lacking = readings.missing_sites(texts)
        missing = [text for text in texts if text not in lacking]
        if not missing:
            return
        title = f"reading activations ({'; '.join(map(str, lacking.sites))})"
        with self.job.reporter.stage(title, len(texts)) as advance:
            advance(len(texts) - len(missing))
            found = self.job.engine.activations(missing, lacking.readouts)
            for text, values in zip(missing, found, strict=True):
                lacking.keep(text, values)
                advance(1)


def _name(text: Passage) -> str:
    """What a text is found by: where its response begins decides what a mean is taken over."""
    return json.dumps([text.prompt, text.response])
