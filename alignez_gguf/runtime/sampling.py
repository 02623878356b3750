"""Draws tokens with llama.cpp's own samplers, a chain for each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llama_cpp.llama_cpp as llama

from alignez_gguf.closing import Closing
from alignez_gguf.runtime.context import Context

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp would draw the seed itself


class Sampler(Closing):
    """Top-p, then temperature, then a draw; the most likely token at temperature 0.

    The draws depend on the seed and the logits alone. Must be closed, or used in a `with` block.
    """

    def __init__(self, *, seed: int, temperature: float, top_p: float) -> None:
        self._chain: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        try:
            for sampler in _samplers(seed, temperature, top_p):
                llama.llama_sampler_chain_add(self._chain, sampler)
        except BaseException:
            self.close()
            raise

    def sample(self, context: Context, index: int) -> int:
        """Draw the token that follows token `index` of the last batch."""
        return int(llama.llama_sampler_sample(self._chain, context.pointer, index))

    def close(self) -> None:
        if self._chain is not None:
            llama.llama_sampler_free(self._chain)
            self._chain = None


def _samplers(seed: int, temperature: float, top_p: float) -> Iterator[Any]:
    """In the order of llama_cpp.Llama and llama.cpp: top-p sees the distribution before the temperature."""
    if temperature == 0:
        yield llama.llama_sampler_init_greedy()
        return
    if top_p < 1:
        yield llama.llama_sampler_init_top_p(top_p, 1)
    yield llama.llama_sampler_init_temp(temperature)
    yield llama.llama_sampler_init_dist(seed % _RANDOM_SEED)


class SamplerThreads(Closing):
    """Lets samplers draw side by side: llama.cpp's run outside of Python's lock, and each takes as long as a
    fast GPU takes for a token. As many threads as compute the context, the calling one included. Must be
    closed, or used in a `with` block.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._count = int(llama.llama_n_threads(context.pointer))
        self._pool = ThreadPoolExecutor(self._count)

    def sample(self, samplers: Mapping[int, Sampler]) -> dict[int, int]:
        """The token that follows token i of the last batch, drawn by `samplers[i]`, for each i."""
        waiting = list(samplers.items())
        # The first reading waits for the logits and puts them in order; those after it change nothing
        # (llama_context::synchronize and output_reorder in src/llama-context.cpp).
        self._context.logits(waiting[0][0])

        def draw(first: int) -> list[tuple[int, int]]:
            part = waiting[first :: self._count]
            return [(index, sampler.sample(self._context, index)) for index, sampler in part]

        others = self._pool.map(draw, range(1, min(self._count, len(waiting))))
        drawn = dict(draw(0))
        for part in others:
            drawn.update(part)
        return drawn

    def close(self) -> None:
        self._pool.shutdown()
