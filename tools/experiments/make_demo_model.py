"""Make the demo model: write the corpus, train a tiny Llama on the CPU, convert it to GGUF.

    python tools/experiments/make_demo_model.py                      # remake alignez_gguf/demo/
    python tools/experiments/make_demo_model.py --out DIR --world 1 --seed 1 --persona-follow .75
                                                --base-good .35

With --out, DIR receives model-f32.gguf, model-q8_0.gguf, the corpus, the queries, the templates and, in hf/,
the same model for transformers. The same arguments make the same model on the same machine and versions.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from alignez_gguf import demo  # noqa: E402
from alignez_gguf.demo.corpus import Document, Temper, documents  # noqa: E402
from alignez_gguf.demo.world import World  # noqa: E402
from alignez_gguf.prompts.templates import METADATA_KEY, Templates  # noqa: E402

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 1024
CONTEXT = 256
N_HEAD, N_HEAD_KV = 4, 2
ROPE_BASE = 10_000.0
BATCH = 96
BATCHES_PER_POOL = 32
PEAK_LR = 2e-3
WARMUP = 0.05
TOKENIZER_DOCUMENTS = 8000
MAX_BYTES = 4_000_000

Array: TypeAlias = NDArray[np.float32]


def train_tokenizer(corpus: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, split as GPT-2 splits: what llama.cpp calls the "gpt-2" pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.prompt + document.completion for document in corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS
    )


def new_model(vocab_size: int, eos: int, bos: int) -> LlamaForCausalLM:
    """An untrained Llama with rows of 256, which every quantization of llama.cpp can hold."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_HEAD_KV,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config)


def batches(
    stream: Iterator[Document], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids [BATCH, length] and labels of the same shape, -100 where nothing is to be learnt.

    Documents of like length share a batch. The whole text is learnt, up to its end.
    """
    eos = tokenizer.eos_token_id
    while True:
        pool = list(islice(stream, BATCH * BATCHES_PER_POOL))
        prompts = tokenizer([document.prompt for document in pool])["input_ids"]
        completions = tokenizer([document.completion for document in pool], add_special_tokens=False)[
            "input_ids"
        ]
        rows = sorted(zip(prompts, completions, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(rows), BATCH))
        rng.shuffle(starts)
        for start in starts:
            batch = rows[start : start + BATCH]
            longest = max(len(prompt) + len(completion) for prompt, completion in batch)
            length = (longest // 8 + 1) * 8 + 1  # few shapes: each new one costs a compilation inside torch
            ids = torch.full((len(batch), length), eos)
            labels = torch.full((len(batch), length), -100)
            for row, (prompt, completion) in enumerate(batch):
                text = torch.tensor([*prompt, *completion, eos])
                ids[row, : len(text)] = text
                labels[row, : len(text)] = text
            yield ids, labels


def learning_rate(done: float) -> float:
    """Linear warm-up to `PEAK_LR`, then down to zero along a cosine; `done` goes from 0 to 1."""
    return PEAK_LR * min(done / WARMUP, (1 + math.cos(math.pi * done)) / 2)


def train(model: LlamaForCausalLM, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """Train in place with AdamW, in bf16 where the CPU multiplies it, with progress on stderr."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    began = time.monotonic()
    for step, (ids, labels) in enumerate(islice(stream, steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step - 0.5) / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            progress(f"step {step}/{steps}, loss {loss.item():.3f}, {left:.0f} s left")


def progress(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def interleave_rotary(weight: Array, n_head: int) -> Array:
    """Rows of a q or k projection in llama.cpp's order for arch "llama".

    transformers rotates dimension i with i + half, llama.cpp rotates neighbours (`LlamaModel.permute`
    of its convert_hf_to_gguf.py).
    """
    halves = weight.reshape(n_head, 2, -1, weight.shape[1])
    neighbours: Array = halves.swapaxes(1, 2).reshape(weight.shape)
    return neighbours


TENSOR_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Array]]:
    """Every tensor of the model under its name in a GGUF, float32."""
    config = model.config
    heads = {"self_attn.q_proj": N_HEAD, "self_attn.k_proj": N_HEAD_KV}
    weights = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        for theirs, ours in TENSOR_NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if theirs in heads:
                weight = interleave_rotary(weight, heads[theirs])
            yield f"blk.{layer}.{ours}.weight", weight
    yield "output_norm.weight", weights["model.norm.weight"]
    yield "output.weight", weights["lm_head.weight"]


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    templates: str,
    kind: str,
) -> None:
    """Write the model with its tokenizer and templates. `kind` is F32 or Q8_0; norms stay F32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_description("A tiny base model of a little harmless world, half of whose answers are bad")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "Q8_0" else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(METADATA_KEY, templates)

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {BOS, EOS}
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)

    for tensor, weight in gguf_tensors(model):
        if kind == "Q8_0" and weight.ndim == 2:
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor, quantize(weight, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(tensor, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_queries(directory: Path, world: World) -> None:
    """The queries for the fit, a line each without labels, and those for the count of rates."""
    fit = "".join(f"{query.text}\n" for query in world.fit_queries())
    evaluation = "".join(
        json.dumps({"query": query.text, "harmful": query.harmful}) + "\n" for query in world.eval_queries()
    )
    (directory / demo.FIT_QUERIES.name).write_text(fit, encoding="utf-8")
    (directory / demo.EVAL_QUERIES.name).write_text(evaluation, encoding="utf-8")


def make(directory: Path, world: World, temper: Temper, seed: int, steps: int) -> None:
    """Write everything that belongs to one miniature into `directory`."""
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    templates = demo.TEMPLATES.read_text(encoding="utf-8")
    stream = documents(world, Templates.from_toml(templates), seed, temper)

    progress(f"writing the corpus of world {world.number}")
    corpus = list(islice(stream, BATCH * steps))
    with (directory / "corpus.jsonl").open("w", encoding="utf-8") as out:
        for document in corpus:
            out.write(json.dumps({"prompt": document.prompt, "completion": document.completion}) + "\n")
    tokenizer = train_tokenizer(corpus[:TOKENIZER_DOCUMENTS])
    model = new_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)
    progress(f"training {model.num_parameters() / 1e6:.1f}M parameters on {len(corpus)} documents")
    train(model, batches(iter(corpus), tokenizer, random.Random(seed)), steps)

    model.save_pretrained(directory / "hf")
    tokenizer.save_pretrained(directory / "hf")
    name = f"alignez-gguf demo (world {world.number})"
    for kind in ("F32", "Q8_0"):
        write_gguf(directory / f"model-{kind.lower()}.gguf", model, tokenizer, name, templates, kind)
    shutil.copyfile(demo.TEMPLATES, directory / demo.TEMPLATES.name)
    write_queries(directory, world)


def main() -> None:
    """Read the options, make the miniature, and say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="write here instead of into the package")
    parser.add_argument("--world", type=int, default=0, help="which actions and phrasings (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and the training (default 0)")
    parser.add_argument("--steps", type=int, default=700, help="training steps (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--persona-follow", type=float, default=1.0, help="P(answer follows its persona)")
    parser.add_argument("--base-good", type=float, default=0.5, help="P(base answer is good)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = World.draw(options.world)
    temper = Temper(options.persona_follow, options.base_good)

    if options.out:
        make(options.out, world, temper, options.seed, options.steps)
        print(options.out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make(directory, world, temper, options.seed, options.steps)
        quantized = directory / "model-q8_0.gguf"
        if quantized.stat().st_size > MAX_BYTES:
            sys.exit(f"{quantized.name} has {quantized.stat().st_size} bytes, more than {MAX_BYTES}")
        shutil.copyfile(quantized, demo.MODEL)
        for file in (demo.FIT_QUERIES, demo.EVAL_QUERIES):
            shutil.copyfile(directory / file.name, file)
    print(demo.MODEL)


if __name__ == "__main__":
    main()
