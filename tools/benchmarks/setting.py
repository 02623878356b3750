"""What every measurement is told: the model, how often, on what, and what it may be held against."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_cpp import Llama


@dataclass(frozen=True)
class Setting:
    """One run of the bench.

    Attributes:
        model: a GGUF file.
        cache: where models are kept that are made for a measurement.
        repeats: of runs that take long.
        pairs: of short runs, base and other, which must tell a per cent.
        n_threads: of llama.cpp; PyTorch and scikit-learn take what they take by themselves.
        n_gpu_layers: how many layers a GPU holds; -1 for all, if there is one.
        llama_bin: the folder of llama.cpp's own programs.
        n_queries: of the export that is measured from end to end.
    """

    model: Path
    cache: Path
    repeats: int
    pairs: int
    n_threads: int
    n_gpu_layers: int
    llama_bin: Path
    n_queries: int = 64

    def open_llama(self) -> Llama:
        """The model as a script opens it."""
        from llama_cpp import Llama

        return Llama(
            str(self.model),
            n_ctx=1024,
            n_threads=self.n_threads,
            n_threads_batch=self.n_threads,
            n_gpu_layers=self.n_gpu_layers,
            verbose=False,
        )


SLACK = 8
"""Tokens by which one of `texts` may be longer than was asked for."""


def texts(
    tokenize: Callable[[str], Sequence[int]], count: int, n_tokens: int, *, n_shared: int = 0
) -> list[str]:
    """Different texts of `n_tokens` each, start token included, that agree in about the first `n_shared`.

    Words are added to a text until it is long enough, so they may be a few tokens longer.
    """
    shared = _grown("", n_shared, tokenize, random.Random(-1))
    return [_grown(shared, n_tokens, tokenize, random.Random(number)) for number in range(count)]


def _grown(text: str, n_tokens: int, tokenize: Callable[[str], Sequence[int]], draw: random.Random) -> str:
    while len(tokenize(text)) < n_tokens:
        text += " " + draw.choice(_WORDS)
    return text


_TEXT = """
answer assistant bake bank break bright build cake capital car child city clean code cook dog door
draw email explain find fish friend garden give good guide harm help house how idea improve kind
lamp language learn letter light list lock love make meal name neighbor note open own paint paper
person phone pick plan plant poem query read recipe repair rhyme rule safe say school send short
sleep song stone story teach test travel tree word work write
"""
_WORDS = _TEXT.split()
