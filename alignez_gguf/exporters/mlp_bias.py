"""Tells how the MLP output of an architecture is scaled on its way into the residual stream.

A constant that is added at the MLP output is one at the block's output too, and the other way round, where
only the residual addition follows. Read in src/models/*.cpp of the pinned llama.cpp: these architectures
load `ffn_down.bias`, hand it to `build_ffn`, and add the result to the residual stream as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from alignez_gguf.control.gguf_header import Value

_ADDED_AS_IT_IS = frozenset(
    {
        "bloom",
        "codeshell",
        "deci",
        "gpt2",
        "gptneox",
        "jais",
        "jais2",
        "llama",
        "mistral3",
        "mpt",
        "nemotron",
        "phi2",
        "starcoder",
        "starcoder2",
    }
)
_ADDED_SCALED = frozenset({"granite"})
"""Times `residual_scale`, where the file has one that is not 0."""


def residual_scale(arch: str, metadata: Mapping[str, Value]) -> float | None:
    """Return the factor of a constant at the MLP output on its way into the residual stream.

    `None` where the architecture loads no bias there, or where a norm or something unknown follows.
    """
    if arch in _ADDED_AS_IT_IS:
        return 1.0
    if arch in _ADDED_SCALED:
        scale = metadata.get(f"{arch}.residual_scale", 0.0)
        return float(scale) if isinstance(scale, (int, float)) and scale else 1.0
    return None
