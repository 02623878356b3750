"""repeng as an anchor of reading: a child process with a transformers model of the same shape.

A child of its own, because PyTorch's threads would disturb llama.cpp's, and because products in bfloat16 kill
the process on some virtual machines. No module here is called repeng: the child would import it in its place.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignez_gguf.runtime.model import Model

_CHILD = Path(__file__).with_name("repeng_child.py")
_DTYPES = ("bfloat16", "float32")


class RepengError(Exception):
    """Neither repeng nor transformers can read a model of this shape here."""


class Repeng:
    """A child process that reads random texts with repeng, or as repeng does.

    Attributes:
        dtype: of the weights.
        is_repeng: False where repeng is not installed, so that transformers is called as it would.
        versions: of what computes.

    Raises:
        RepengError: the child died; `bfloat16` does that to it on some machines.
    """

    def __init__(self, shape: dict[str, int], dtype: str, n_texts: int, n_tokens: int) -> None:
        self.dtype = dtype
        self._n_tokens = n_texts * n_tokens
        task = {"shape": shape, "dtype": dtype, "n_texts": n_texts, "n_tokens": n_tokens}
        self._process = subprocess.Popen(
            [sys.executable, str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        ready = self._ask(json.dumps(task))
        self.is_repeng = bool(ready["is_repeng"])
        self.versions: dict[str, str] = ready["versions"]

    @classmethod
    def fastest(cls, model: Model, n_texts: int, n_tokens: int) -> Repeng:
        """With the shape of a model, in the faster of bfloat16 and float32. Raises `RepengError`."""
        shape = _shape(model)
        speeds = {dtype: _tried(shape, dtype, n_texts, n_tokens) for dtype in _DTYPES}
        fastest = max(speeds, key=speeds.__getitem__)
        if speeds[fastest] == 0:
            raise RepengError("transformers cannot compute a model of this shape here")
        best = cls(shape, fastest, n_texts, n_tokens)
        best.speed()
        return best

    def speed(self) -> float:
        """Tokens/s of reading all texts once."""
        return self._n_tokens / float(self._ask("read")["seconds"])

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            self._process.kill()
            raise RepengError(f"reading in {self.dtype} ended with {self._process.wait()}") from error

    def __enter__(self) -> Repeng:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.__exit__(kind, error, trace)


def _tried(shape: dict[str, int], dtype: str, n_texts: int, n_tokens: int) -> float:
    """Tokens/s of a second reading; 0 where the child dies of the dtype."""
    try:
        with Repeng(shape, dtype, n_texts, n_tokens) as child:
            child.speed()
            return child.speed()
    except RepengError:
        return 0.0


def _shape(model: Model) -> dict[str, int]:
    """Of a model with one size for all layers. Raises `RepengError`."""

    def number(key: str) -> int:
        return int(model.metadata(f"{model.info.arch}.{key}") or "")

    try:
        return {
            "vocab_size": model.n_vocab,
            "hidden_size": model.info.n_embd,
            "num_hidden_layers": model.info.n_layer,
            "intermediate_size": number("feed_forward_length"),
            "num_attention_heads": number("attention.head_count"),
            "num_key_value_heads": number("attention.head_count_kv"),
        }
    except ValueError:
        raise RepengError(f"the shape of {model.info.arch} is not that of a Llama model") from None
