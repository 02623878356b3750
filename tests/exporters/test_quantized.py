"""On quantized files: the stock forms against the patch, both in one library.

A difference in the last bit can make a number that lies between two steps of an 8-bit rounding fall to the
other one, which moves logits by hundredths; the same removal, written in another basis of the same subspace,
does so in one prompt of six or fewer. So the middle one of several prompts is looked at.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf.control.edits import LayerEdit
from tests.exporters.adapted import adapters, logits, written
from tests.models import quantized, tiny_model
from tests.runtime.context import Context, rows

PROMPTS = [[int(t) for t in np.random.default_rng(seed).integers(5, 370, 32)] for seed in range(5)]
PARITY = 5e-5
"""How far the forms may be apart where one batch and single tokens give the same, as in F32."""


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """A CPU that lacks an instruction kills the process at the first product with a quantized matrix."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize(
    ("architecture", "file_type", "n_embd"),
    [
        ("llama", "Q8_0", 64),
        ("llama", "Q4_0", 64),
        ("llama", "Q5_0", 64),
        ("llama", "Q4_1", 64),
        ("llama", "Q5_1", 64),
        ("llama", "BF16", 64),
        ("qwen2moe", "Q4_1", 64),
        ("llama", "Q2_K", 256),
        ("llama", "Q3_K_M", 256),
        ("llama", "Q4_K_M", 256),
        ("llama", "Q5_K_M", 256),
        ("llama", "Q6_K", 256),
        ("llama", "IQ4_XS", 256),
        ("qwen2", "Q4_K_M", 256),
        ("olmo2", "Q8_0", 64),
        ("qwen2moe", "Q4_K_M", 256),
    ],
)
def test_patched_and_stock_differ_by_no_more_than_one_batch_and_single_tokens_do(
    child: ProcessPoolExecutor, architecture: str, file_type: str, n_embd: int
) -> None:
    path = quantized(tiny_model(architecture, n_embd=n_embd).gguf, file_type)

    between, batching, effect = child.submit(differences, path, n_embd).result()

    assert between <= max(batching, PARITY)
    assert effect > 0.1


def differences(path: Path, n_embd: int) -> tuple[float, float, float]:
    """How far the logits of the patched model are from stock, from token by token, and from the base."""
    random = np.random.default_rng(1).standard_normal
    edits = {
        layer: LayerEdit(remove=random((2, n_embd)), add=0.3 * random(n_embd) if layer else None)
        for layer in range(3)
    }
    with tempfile.TemporaryDirectory() as folder, Context(path) as context:
        loaded = adapters(context, written(path, edits, Path(folder)))
        stock = [logits(context, loaded, prompt, 1.0) for prompt in PROMPTS]
        loaded.steer(0.0, range(0))
        base = [context.logits(rows(prompt)) for prompt in PROMPTS]
        context.set_edits(edits)
        patched = [context.logits(rows(prompt)) for prompt in PROMPTS]
        single = [token_by_token(context, prompt) for prompt in PROMPTS]
    return middle(patched, stock), middle(patched, single), middle(patched, base)


def token_by_token(context: Context, prompt: list[int]) -> NDArray[np.float32]:
    context.clear()
    return np.concatenate([context.decode(rows([token], start=i)) for i, token in enumerate(prompt)])


def middle(a: list[NDArray[np.float32]], b: list[NDArray[np.float32]]) -> float:
    """Median over the prompts of the largest difference."""
    return statistics.median(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))
