"""The child process of `repeng_parent.py`: a task as JSON on the first line, then a line for every reading.

A random Llama of the shape of the measured model reads random texts: weights decide nothing about the time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers


def main() -> None:
    """Answer every line on stdin with one on stdout."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nobody else may write between the answers
    task = json.loads(sys.stdin.readline())
    read = _reader()
    model = _model(task["shape"], task["dtype"])
    layers = list(range(model.config.num_hidden_layers))
    texts = [" ".join(["word"] * task["n_tokens"])] * task["n_texts"]
    tokenizer = _tokenizer()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if read is not None:
        versions["repeng"] = importlib.metadata.version("repeng")
    print(json.dumps({"is_repeng": read is not None, "versions": versions}), file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        (read or _read)(model, tokenizer, texts, layers, 32)
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)


def _reader() -> Callable[..., Any] | None:
    """repeng's own function, which `ControlVector.train` calls with batches of 32."""
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]  # NumPy 2 dropped it; repeng 0.4 annotates with it
    try:
        found: Callable[..., Any] = importlib.import_module("repeng.extract").batched_get_hiddens
    except ImportError:
        return None
    return found


def _read(model: Any, tokenizer: Any, texts: list[str], layers: list[int], batch_size: int) -> None:
    """What repeng computes, where it is not installed: the last hidden state of every layer, as float32."""
    with torch.no_grad():
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt")
            states = model(**batch, output_hidden_states=True).hidden_states
            for layer in layers:
                states[layer + 1][:, -1].float().numpy()


def _model(shape: dict[str, Any], dtype: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, bos_token_id=None, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def _tokenizer() -> Any:
    """Every word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"word": 0, "<pad>": 1}, unk_token="word"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, pad_token="<pad>"
    )


if __name__ == "__main__":
    main()
