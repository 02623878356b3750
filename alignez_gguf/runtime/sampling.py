"""Draws tokens with llama.cpp's own samplers, a chain for each sequence."""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as llama

from alignez_gguf.runtime.context import Context

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp would draw the seed itself


class Sampler:
    """Top-p, then temperature, then a draw; the most likely token at temperature 0.

    The draws depend on the seed and the logits alone. Must be closed, or used in a `with` block.
    """

    def __init__(self, *, seed: int, temperature: float, top_p: float) -> None:
        self._chain: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if temperature == 0:
            self._add(llama.llama_sampler_init_greedy())
            return
        # The order of llama_cpp.Llama and llama.cpp: top-p sees the distribution before the temperature.
        if top_p < 1:
            self._add(llama.llama_sampler_init_top_p(top_p, 1))
        self._add(llama.llama_sampler_init_temp(temperature))
        self._add(llama.llama_sampler_init_dist(seed % _RANDOM_SEED))

    def _add(self, sampler: Any) -> None:
        llama.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Context, index: int) -> int:
        """Draw the token that follows token `index` of the last batch."""
        return int(llama.llama_sampler_sample(self._chain, context.pointer, index))

    def close(self) -> None:
        if self._chain is not None:
            llama.llama_sampler_free(self._chain)
            self._chain = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
