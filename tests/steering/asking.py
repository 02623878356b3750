"""Asking a `llama_cpp.Llama`, and what the documentation says that each token is steered by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama, LlamaRAMCache
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.steering.steer import steer
from tests.runtime import gpu
from tests.runtime.gpu import tolerance

PARITY = tolerance(5e-5)
"""Largest difference to PyTorch in F32."""
N_ANSWER = 6
PROMPT = [int(token) for token in np.random.default_rng(0).integers(5, 380, 24)]
MORE = [int(token) for token in np.random.default_rng(1).integers(5, 380, 8)]


def load(gguf: Path, **options: Any) -> Llama:
    """With keys and values in F32, unless the options say otherwise, and every logit."""
    defaults = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    defaults |= {"n_gpu_layers": gpu.LAYERS, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    return Llama(str(gguf), **(defaults | options))


def answer(llm: Llama, prompt: Sequence[int], n_tokens: int = N_ANSWER) -> list[int]:
    """Greedy tokens."""
    return list(islice(llm.generate(list(prompt), temp=0.0), n_tokens))


def cached(llm: Llama) -> tuple[list[int], NDArray[np.float32]]:
    """The tokens in the cache and the logits that each gave."""
    return llm.input_ids[: llm.n_tokens].tolist(), llm.scores[: llm.n_tokens].copy()


def strengths(scope: str, strength: float, n_prompt: int, n_tokens: int) -> list[float]:
    """Of each token of a request, by the words of the documentation."""
    last = n_prompt - 1
    n_steered = {"generation": n_tokens - last, "all": n_tokens, "first:2": min(2, n_tokens - last)}[scope]
    before = 0 if scope == "all" else last
    return [0.0] * before + [strength] * n_steered + [0.0] * (n_tokens - before - n_steered)


def assert_cache_of_states_leaks_nothing(
    llm: Llama, control: ControlFile, expected_answer: Callable[[list[int], float], list[int]]
) -> None:
    """Ask through a cache of states, steered, steered less and not, and hold each text against the oracle.

    Args:
        expected_answer: greedy tokens to a prompt, steered everywhere by `control` at a strength.
    """

    def ask(prompt: list[int]) -> str:
        text: str = llm.create_completion(prompt, max_tokens=N_ANSWER, temperature=0.0)["choices"][0]["text"]
        return text

    def expected(prompt: list[int], strength: float) -> str:
        tokens = expected_answer(prompt, strength)
        assert llm.token_eos() not in tokens
        text: str = llm.detokenize(tokens).decode(errors="ignore")
        return text

    llm.set_cache(LlamaRAMCache())
    with steer(llm, control, scope="all") as steering:
        assert ask(PROMPT) == expected(PROMPT, 1.0)
        llm.reset()
        steering.strength = 0.5
        assert ask(PROMPT + MORE) == expected(PROMPT + MORE, 0.5)
    llm.reset()
    assert ask(PROMPT + MORE) == expected(PROMPT + MORE, 0.0)
