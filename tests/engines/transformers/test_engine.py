"""TransformersEngine against LlamaEngine over the same weights, and against plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from alignez_gguf.engines.base import Completion, GenerationRequest, Passage, Sampling
from alignez_gguf.engines.llama import sequences
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.engines.transformers.engine import TransformersEngine
from alignez_gguf.engines.transformers.generation import IncrementalDetokenizer, draw
from alignez_gguf.engines.transformers.info import gguf_architecture
from alignez_gguf.errors import MissingExtraError, ModelFileError, QueryError, SteeringError
from alignez_gguf.readout import Readout
from alignez_gguf.runtime.context import Context
from tests.models import ARCHITECTURES, tiny_model, tokenizer

SHARED = "Question: how do I bake a cake?\nAnswer: make a plan, work slowly and mind the oven.\n" * 3
PASSAGES = [
    Passage(f"{SHARED}Question: why?\nAnswer:", " sorry, that is not something that I can help with." * 3),
    Passage("x"),
    Passage("", "The quick brown fox"),
    Passage("The quick brown fox jumps over", " the lazy dog"),
    Passage(f"{SHARED}Question: how?\nAnswer:", " make a plan"),
]
ANSWERED = [PASSAGES[0], PASSAGES[3], PASSAGES[4]]
PROMPTS = [passage.text for passage in PASSAGES]
READOUTS = [Readout(hook, pooling) for hook, pooling in product(("mlp", "residual"), ("last", "mean"))]
GREEDY = Sampling(max_tokens=24, temperature=0)
DRAWN = Sampling(max_tokens=24, temperature=1.0, top_p=0.95)

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The directory of a tiny model as transformers writes it."""

    @cache
    def save(architecture: str) -> Path:
        directory = tmp_path_factory.mktemp(architecture)
        tiny_model(architecture).hf.save_pretrained(directory)
        tokenizer().save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="module")
def engine(saved: Saved) -> TransformersEngine:
    return TransformersEngine(saved("llama"), n_ctx=256, n_parallel=4)


@pytest.fixture
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in F32, as PyTorch has them."""
    monkeypatch.setattr(sequences, "Context", lambda *args, **kw: Context(*args, **kw, f32_cache=True))


def completed(
    engine: TransformersEngine | LlamaEngine, sampling: Sampling, prompts: list[str] = PROMPTS
) -> list[Completion]:
    requests = [GenerationRequest(prompt, seed) for seed, prompt in enumerate(prompts)]
    found = dict(engine.generate(requests, sampling))
    return [found[index] for index in range(len(prompts))]


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_engines_read_and_predict_the_same(architecture: str, saved: Saved) -> None:
    # llama.cpp looks up gemma's GELU in a table of float16.
    tolerance = 3e-3 if architecture == "gemma3" else 5e-5
    ours = TransformersEngine(saved(architecture), n_ctx=256, n_parallel=3)
    with LlamaEngine(tiny_model(architecture).gguf, n_ctx=256, n_threads=1) as theirs:
        assert (ours.info.arch, ours.info.n_embd, ours.info.n_layer) == (theirs.info.arch, 64, 3)
        expected = np.stack(list(theirs.activations(PASSAGES, READOUTS)))
        found = np.stack(list(ours.activations(PASSAGES, READOUTS)))
        assert found.dtype == expected.dtype == np.float16
        largest = np.abs(expected).max((-1, -2), keepdims=True).astype(np.float32)
        difference = np.abs(found.astype(np.float32) - expected)
        assert (difference <= 2.0**-10 * np.abs(expected) + tolerance * largest).all()
        found = np.stack(list(ours.next_token_logprobs(PROMPTS)))
        expected = np.stack(list(theirs.next_token_logprobs(PROMPTS)))
        np.testing.assert_allclose(found, expected, atol=10 * tolerance)
        for max_tokens in (None, 2):
            np.testing.assert_allclose(
                list(ours.response_logprobs(ANSWERED, max_tokens=max_tokens)),
                list(theirs.response_logprobs(ANSWERED, max_tokens=max_tokens)),
                rtol=tolerance,
            )


@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize("architecture", ["llama", "olmo2", "qwen2moe"])
def test_both_engines_write_the_same(architecture: str, saved: Saved) -> None:
    found = completed(TransformersEngine(saved(architecture), n_ctx=256, n_parallel=3), GREEDY)
    with LlamaEngine(tiny_model(architecture).gguf, n_ctx=256, n_threads=1) as engine:
        expected = completed(engine, GREEDY)
    assert [completion.n_tokens for completion in found] == [c.n_tokens for c in expected]
    # Bytes at the end that are no character are dropped here even where no more bytes could make one of them.
    assert [c.text.rstrip("\ufffd") for c in found] == [c.text.rstrip("\ufffd") for c in expected]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_completions_do_not_depend_on_how_many_grow_at_once(
    architecture: str, sampling: Sampling, saved: Saved
) -> None:
    """Gemma's window of 16 tokens is shorter than the padding."""
    engines = [TransformersEngine(saved(architecture), n_ctx=256, n_parallel=n) for n in (1, 2, 32)]
    alone, few, all_at_once = (completed(engine, sampling) for engine in engines)
    assert alone == few == all_at_once
    assert len({completion.text for completion in alone}) == len(PROMPTS)


def test_the_seed_decides_a_drawn_completion(engine: TransformersEngine) -> None:
    requests = [GenerationRequest(PROMPTS[0], seed) for seed in (1, 2, 1)]
    found = dict(engine.generate(requests, DRAWN))
    assert found[0] == found[2] != found[1]


def test_draws_follow_the_distribution_that_top_p_and_temperature_leave() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -3.0, 1.5])
    p = logits.softmax(-1).numpy()
    # 0.50, 0.30, 0.18 are the largest; the third one crosses 0.9.
    kept = np.isin(np.arange(5), [1, 4, 2])
    expected = np.where(kept, np.exp(logits.numpy() / 0.7), 0)
    assert p[[1, 4]].sum() < 0.9 < p[[1, 4, 2]].sum()
    generators = [torch.Generator().manual_seed(seed) for seed in range(20000)]
    drawn = draw(logits.expand(20000, 5), generators, Sampling(1, temperature=0.7, top_p=0.9))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 20000, expected / expected.sum(), atol=0.015)


def test_stop_string_ends_a_text_and_pieces_add_up(engine: TransformersEngine) -> None:
    free = completed(engine, GREEDY)[0]
    sampling = Sampling(24, 0, stop=(free.text[8:13],))
    streamed: dict[int, str] = {}

    def show(index: int, piece: str) -> None:
        streamed[index] = streamed.get(index, "") + piece

    found = dict(engine.generate([GenerationRequest(p) for p in PROMPTS], sampling, on_text=show))
    assert found[0].text == free.text[: free.text.index(sampling.stop[0])]
    assert (found[0].finish_reason, found[0].n_tokens < free.n_tokens) == ("stop", True)
    assert streamed == {index: c.text for index, c in found.items() if c.text}


def test_token_that_ends_a_text_is_not_part_of_it(engine: TransformersEngine) -> None:
    ended = [
        completion
        for completion in completed(engine, Sampling(24, temperature=10.0), ["x"] * 100)
        if completion.finish_reason == "stop"
    ]
    assert ended
    assert all("</s>" not in completion.text and completion.n_tokens < 24 for completion in ended)


def test_characters_split_over_tokens_appear_when_they_are_complete() -> None:
    text = "é 日本 x"
    pieces = tokenizer().encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer().decode, tokenizer().encode("a"))
    shown = [detokenizer.add(token) for token in pieces]
    assert "".join(shown) == text
    assert len(pieces) > len(text)
    assert not any("\ufffd" in piece for piece in shown)


def test_a_leading_space_that_a_tokenizer_drops_at_the_start_is_kept() -> None:
    words = ["\u2581how", "\u2581do", "\u2581I"]

    def decode(tokens: object) -> str:
        return "".join(words[token] for token in tokens).replace("\u2581", " ").removeprefix(" ")  # type: ignore[attr-defined]

    detokenizer = IncrementalDetokenizer(decode, [0])
    assert [detokenizer.add(1), detokenizer.add(2)] == [" do", " I"]


def test_text_that_does_not_fit_is_refused_before_anything_is_computed(engine: TransformersEngine) -> None:
    with pytest.raises(QueryError, match=r"takes \d+ tokens and 24 for the answer, more than .* 256"):
        engine.generate([GenerationRequest("x"), GenerationRequest("why " * 100)], GREEDY)
    with pytest.raises(QueryError, match=r"takes \d+ tokens, more than the context of 256"):
        engine.activations([Passage("why " * 200)], READOUTS)
    with pytest.raises(QueryError, match="is empty"):
        engine.next_token_logprobs([""])
    with pytest.raises(QueryError, match="has no response"):
        engine.response_logprobs([Passage("x")])


def test_strength_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(SteeringError, match="unsteered"):
        engine.generate([GenerationRequest("x", strength=1.0)], GREEDY)


def test_half_precision_reads_nearly_the_same(saved: Saved) -> None:
    for dtype, name in (("float16", "F16"), ("bfloat16", "BF16")):
        half = TransformersEngine(saved("llama"), dtype=dtype)
        assert half.info.quantization == name
        expected = np.stack(list(TransformersEngine(saved("llama")).activations(PASSAGES, READOUTS)))
        found = np.stack(list(half.activations(PASSAGES, READOUTS)))
        assert not np.array_equal(found, expected)
        cosine = np.sum(found * expected, -1, dtype=np.float32) / (
            np.linalg.norm(found.astype(np.float32), axis=-1)
            * np.linalg.norm(expected.astype(np.float32), axis=-1)
        )
        assert cosine.min() > 0.99


def test_fingerprint_tells_fine_tunes_apart_and_not_runs(saved: Saved, tmp_path: Path) -> None:
    first = TransformersEngine(saved("llama"))
    assert first.info == TransformersEngine(saved("llama")).info
    assert first.info.name == saved("llama").name
    tuned = _copied(saved("llama"), tmp_path)
    weights = load_file(tuned / "model.safetensors")
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, tuned / "model.safetensors")
    assert TransformersEngine(tuned).info.fingerprint != first.info.fingerprint


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mistral", "llama"),
        ("gpt_oss", "gpt-oss"),
        ("qwen3_moe", "qwen3moe"),
        ("gpt_neox", "gptneox"),
        ("granitemoe", "granitemoe"),
        ("phi", "phi2"),
        ("opt", "opt"),
    ],
)
def test_architecture_has_the_name_of_its_gguf(model_type: str, name: str) -> None:
    assert gguf_architecture(model_type) == name


def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for path in ("./nowhere", tmp_path / "model.gguf"):
        with pytest.raises(ModelFileError, match=f"there is no model directory {path}"):
            TransformersEngine(path)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_directory_that_is_not_complete_is_named_in_one_line(
    missing: str, saved: Saved, tmp_path: Path
) -> None:
    directory = _copied(saved("llama"), tmp_path)
    (directory / missing).unlink()
    with pytest.raises(ModelFileError, match=f"cannot load {directory}") as caught:
        TransformersEngine(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoder_that_transformers_loads_as_a_language_model_is_refused(tmp_path: Path, dtype: str) -> None:
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=r"is an embedding model \(bert\).*; give a language model"):
        TransformersEngine(tmp_path, dtype=dtype)


def test_weights_that_are_missing_are_not_made_up(saved: Saved, tmp_path: Path) -> None:
    directory = _copied(saved("llama"), tmp_path)
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"lacks the weights model\.layers\.1\.mlp\.down_proj\.weight"):
        TransformersEngine(directory)


def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'alignez-gguf\[transformers\]'"):
        TransformersEngine("some/model")


def test_engine_needs_no_llama_cpp(saved: Saved) -> None:
    program = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from alignez_gguf.engines.base import Passage; from alignez_gguf.readout import Readout\n"
        "from alignez_gguf.engines.transformers.engine import TransformersEngine\n"
        "engine = TransformersEngine(sys.argv[1])\n"
        "print(next(engine.activations([Passage('x')], [Readout()])).shape)\n"
        "with engine.steered([Passage('why not?', ' x')]) as model: model.log_likelihoods({}, [0])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, str(saved("llama"))],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (run.stdout, run.returncode, run.stderr) == ("(1, 3, 64)\n", 0, "")


def test_layers_without_an_mlp_of_a_known_name_are_refused_only_where_it_is_needed(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(saved("llama"))
    assert engine.hooks == {"mlp", "residual"}
    del engine.model.mlps
    for block in engine.model.blocks:
        block.add_module("shared_mlp", torch.nn.Identity())
    assert engine.hooks == {"residual"}
    assert next(engine.activations(PASSAGES, [Readout("residual")])).shape == (1, 3, 64)
    with pytest.raises(ModelFileError, match="the MLP of layer 0 of the architecture 'llama'"):
        engine.activations(PASSAGES, READOUTS)


def _copied(directory: Path, target: Path) -> Path:
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
