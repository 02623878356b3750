"""Make models of real shapes with random weights, to measure speed on.

    python3 tools/benchmarks/make_bench_model.py 22x2048 [--level Q4_K_M] [--cache DIR]

A model is made once and kept: build/bench/22x2048-Q4_K_M.gguf. What it writes is noise, but of words: as
with a real tokenizer, a word of the package's own prompts is about one token, and a text that the model wrote
has about as many tokens when it is read; and its answers depend on the persona that is asked.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama-like model."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int = 32_000

    @property
    def name(self) -> str:
        return f"{self.n_layer}x{self.n_embd}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(30, 576, 1536, 9, 3),  # SmolLM2-135M
        Shape(22, 2048, 5632, 32, 4),  # TinyLlama-1.1B
        Shape(32, 4096, 14336, 32, 8),  # Llama-3-8B
    )
}
LEVELS = ("Q4_K_M", "Q8_0")
CONTEXT = 4096

_GAINS = {"attn_q": 2.0, "attn_k": 2.0, "attn_v": 4.0, "attn_output": 4.0, "output": 4.0}
"""How strongly what came before speaks in a token, and how sure the model is of it: so that it answers two
personas differently, as it must for the export to keep its pairs. All other products keep their scale."""

_WORDS = 60_000
"""Made-up words that the vocabulary is filled with."""


def make(shape: Shape, level: str, cache: Path) -> Path:
    """The path of the model, made if it is not there."""
    from alignez_gguf.runtime.quantize import quantize_file
    from alignez_gguf.storage.atomic import replacing

    path = cache / f"{shape.name}-{level}.gguf"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        source = cache / f"{shape.name}-F16.gguf"
        print(f"making {path}", file=sys.stderr)
        try:
            _write(source, shape)
            with replacing(path) as unfinished:
                quantize_file(source, unfinished, level, n_threads=os.cpu_count() or 1)
        finally:
            source.unlink(missing_ok=True)
    return path


def _write(path: Path, shape: Shape) -> None:
    """A GGUF in F16, written tensor by tensor."""
    import gguf
    import numpy as np

    head = shape.n_embd // shape.n_head
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {shape.name}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer, shape.n_vocab)
    tensors = list(_tensors(shape, head))
    for tensor, dimensions in tensors:
        dtype = np.float16 if len(dimensions) == 2 else np.float32
        size = int(np.prod(dimensions)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(tensor, dimensions, np.dtype(dtype), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for tensor, dimensions in tensors:
        if len(dimensions) == 1:
            weight = np.ones(dimensions, np.float32)
        else:
            deviation = _GAINS.get(tensor.split(".")[-2], 1.0) / dimensions[1] ** 0.5
            weight = (deviation * rng.standard_normal(dimensions, dtype=np.float32)).astype(np.float16)
        writer.write_tensor_data(weight)
    writer.close()


def _tensors(shape: Shape, head: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and dimensions, the outer one first."""
    n_embd, n_kv = shape.n_embd, head * shape.n_head_kv
    yield "token_embd.weight", (shape.n_vocab, n_embd)
    for layer in range(shape.n_layer):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (n_embd,)
        yield f"{block}.attn_q.weight", (n_embd, n_embd)
        yield f"{block}.attn_k.weight", (n_kv, n_embd)
        yield f"{block}.attn_v.weight", (n_kv, n_embd)
        yield f"{block}.attn_output.weight", (n_embd, n_embd)
        yield f"{block}.ffn_norm.weight", (n_embd,)
        yield f"{block}.ffn_gate.weight", (shape.n_ff, n_embd)
        yield f"{block}.ffn_up.weight", (shape.n_ff, n_embd)
        yield f"{block}.ffn_down.weight", (n_embd, shape.n_ff)
    yield "output_norm.weight", (n_embd,)
    yield "output.weight", (shape.n_vocab, n_embd)


def _add_tokenizer(writer: Any, n_vocab: int) -> None:
    """A byte-level BPE of exactly `n_vocab` tokens."""
    import json

    import gguf

    bpe = json.loads(_trained(n_vocab).to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    if len(tokens) != n_vocab:
        raise ValueError(f"the text gives {len(tokens)} tokens, not {n_vocab}; make up more words")
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (n_vocab - 2))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def _trained(n_vocab: int) -> Tokenizer:
    """Trained on the package's own texts, which come first, and on made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    data = setup_environment.ROOT / "alignez_gguf" / "data"
    own = [(data / name).read_text(encoding="utf-8") for name in ("queries.txt", "templates.toml")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*own * 50, " ".join(_words())], trainer)
    return tokenizer


def _words() -> Iterator[str]:
    """Words of one to three made-up syllables, always the same ones."""
    draw = random.Random(0)
    for _ in range(_WORDS):
        syllables = draw.randint(1, 3)
        yield "".join(
            draw.choice("bcdfghklmnprstvwz")
            + draw.choice("aeiou")
            + draw.choice(("", "", "n", "r", "l", "s"))
            for _ in range(syllables)
        )


def main() -> None:
    """Read the options, make the model, and say where it is."""
    options = _parse()
    print(make(SHAPES[options.shape], options.level, options.cache))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[0], help="default: %(default)s")
    parser.add_argument(
        "--cache",
        type=Path,
        default=setup_environment.ROOT / "build" / "bench",
        help="where models are kept (default: build/bench)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    _parse()  # --help and bad usage need no set-up
    setup_environment.enter()
    main()
