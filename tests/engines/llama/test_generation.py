from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import Llama

from alignez_gguf.engines.base import Completion, GenerationRequest, Sampling
from alignez_gguf.engines.llama import engine as llama_engine
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import QueryError, SteeringError
from alignez_gguf.runtime.model import Model
from tests.models import quantized, tiny_model

FEW_SHOT = "Question: how do I bake a cake?\nAnswer: make a plan, work slowly and mind the oven.\n" * 2
PROMPTS = [
    *(
        f"{FEW_SHOT}Question: how do I {action}?\nAnswer:"
        for action in ("pick a lock", "wash a dog", "sleep")
    ),
    "The quick brown fox",
    "x",
    *(f"Question number {number}: why?" for number in range(7)),
]
GREEDY = Sampling(max_tokens=24, temperature=0)
DRAWN = Sampling(max_tokens=24, temperature=1.0, top_p=0.95)


@pytest.fixture(scope="module")
def gguf() -> Path:
    return tiny_model("llama").gguf


@pytest.fixture(scope="module")
def engine(gguf: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(gguf, n_ctx=256, n_parallel=4, n_threads=1) as engine:
        yield engine


def requests(prompts: list[str] = PROMPTS) -> list[GenerationRequest]:
    return [GenerationRequest(prompt, seed) for seed, prompt in enumerate(prompts)]


def completed(
    engine: LlamaEngine, sampling: Sampling, asked: list[GenerationRequest] | None = None
) -> list[Completion]:
    found = dict(engine.generate(requests() if asked is None else asked, sampling))
    return [found[index] for index in range(len(found))]


def test_greedy_text_equals_that_of_llama_cpp_python(engine: LlamaEngine, gguf: Path) -> None:
    llm = Llama(str(gguf), n_ctx=256, n_threads=1, verbose=False)

    def greedy(prompt: str) -> str:
        tokens = llm.generate(llm.tokenize(prompt.encode()), temp=0.0, repeat_penalty=1.0)
        written = takewhile(lambda token: token != llm.token_eos(), islice(tokens, GREEDY.max_tokens))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(llm.detokenize(list(written)))

    found = completed(engine, GREEDY)
    assert [completion.text for completion in found] == [greedy(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_completions_do_not_depend_on_how_many_grow_at_once(
    gguf: Path, file_type: str, sampling: Sampling
) -> None:
    path = gguf if file_type == "F32" else quantized(gguf, file_type)
    found = []
    for n_parallel in (1, 4, 32):
        with LlamaEngine(path, n_ctx=256, n_parallel=n_parallel, n_threads=1) as engine:
            found.append(completed(engine, sampling))
    assert found[0] == found[1] == found[2]
    assert len({completion.text for completion in found[0]}) == len(PROMPTS)


def test_a_neighbour_never_changes_a_completion(engine: LlamaEngine) -> None:
    everybody = completed(engine, DRAWN)
    for index, request in enumerate(requests()):
        assert completed(engine, DRAWN, [request]) == [everybody[index]]


@pytest.mark.parametrize("file_type", ["F32", "Q8_0"])
def test_long_completions_do_not_depend_on_how_many_grow_at_once(
    gguf: Path, file_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "ends_text", lambda *_: False)  # whatever a machine's rounding makes of it
    path = gguf if file_type == "F32" else quantized(gguf, file_type)
    long = Sampling(max_tokens=300, temperature=0.7)
    found = []
    for n_parallel in (1, 3):
        with LlamaEngine(path, n_ctx=512, n_parallel=n_parallel, n_threads=1) as engine:
            found.append(completed(engine, long, requests(PROMPTS[:3])))
    assert found[0] == found[1]
    assert [completion.n_tokens for completion in found[0]] == [300] * 3


def test_the_seed_decides_a_drawn_completion(engine: LlamaEngine) -> None:
    asked = [GenerationRequest(PROMPTS[0], seed) for seed in (1, 2, 1, 0xFFFFFFFF, 0xFFFFFFFF)]
    one, two, again, top, top_again = completed(engine, DRAWN, asked)
    assert one == again
    assert top == top_again
    assert len({one.text, two.text, top.text}) == 3


def test_top_p_near_zero_draws_the_most_likely_token(engine: LlamaEngine) -> None:
    narrow = Sampling(max_tokens=24, temperature=1.5, top_p=1e-6)
    assert completed(engine, narrow) == completed(engine, GREEDY)


def test_stop_string_ends_a_text_and_is_not_part_of_it(engine: LlamaEngine) -> None:
    free = completed(engine, GREEDY)[0]
    # From the middle of the text, and longer than most tokens: it straddles some.
    stop = free.text[8:13]
    (found,) = completed(engine, Sampling(24, 0, stop=(stop,)), requests()[:1])
    assert found.text == free.text[: free.text.index(stop)]
    assert found.finish_reason == "stop"
    assert found.n_tokens < free.n_tokens


def test_streamed_pieces_add_up_to_the_text(engine: LlamaEngine) -> None:
    free = completed(engine, GREEDY)
    sampling = Sampling(24, 0, stop=(free[0].text[8:13],))
    streamed: dict[int, str] = {}

    def show(index: int, piece: str) -> None:
        streamed[index] = streamed.get(index, "") + piece

    found = dict(engine.generate(requests(), sampling, on_text=show))
    assert streamed == {index: completion.text for index, completion in found.items()}


def test_text_that_reaches_the_limit_says_so(engine: LlamaEngine) -> None:
    (found,) = completed(engine, Sampling(max_tokens=1, temperature=0), requests()[:1])
    assert (found.n_tokens, found.finish_reason) == (1, "length")


def test_token_that_ends_a_text_is_not_part_of_it(engine: LlamaEngine) -> None:
    many = [GenerationRequest("x", seed) for seed in range(200)]
    flat = Sampling(max_tokens=24, temperature=10.0)
    ended = [found for found in completed(engine, flat, many) if found.finish_reason == "stop"]
    assert ended
    assert all("</s>" not in found.text and found.n_tokens < 24 for found in ended)


def test_prompt_that_does_not_fit_is_refused_before_anything_is_computed(engine: LlamaEngine) -> None:
    asked = [*requests()[:1], GenerationRequest("why is it " * 60)]
    shown: list[str] = []
    with pytest.raises(QueryError, match=r"'why is it .{40,60}\.\.\.' takes \d+ tokens and 24 .* 256"):
        engine.generate(asked, GREEDY, on_text=lambda _, piece: shown.append(piece))
    assert shown == []


def test_prompt_and_answer_may_fill_the_context(engine: LlamaEngine) -> None:
    n_prompt = len(engine.model.tokenize(PROMPTS[0]))
    full = Sampling(max_tokens=256 - n_prompt, temperature=0)
    (found,) = completed(engine, full, requests()[:1])
    assert found.n_tokens == 256 - n_prompt or found.finish_reason == "stop"


def test_empty_prompt_is_refused(engine: LlamaEngine) -> None:
    with pytest.raises(QueryError, match="empty"):
        engine.generate([GenerationRequest("")], GREEDY)


def test_strength_without_an_edit_is_refused(engine: LlamaEngine) -> None:
    with pytest.raises(SteeringError, match="no edit is set"):
        engine.generate([GenerationRequest("x", strength=1.0)], GREEDY)


def test_second_generation_cannot_disturb_one_that_is_not_finished(engine: LlamaEngine) -> None:
    first = engine.generate(requests(), GREEDY)
    next(first)
    with pytest.raises(RuntimeError, match="is generating"):
        next(engine.generate(requests(), GREEDY))
    first.close()  # type: ignore[attr-defined]
    assert len(completed(engine, GREEDY)) == len(PROMPTS)


def test_closed_engine_refuses_to_work(gguf: Path) -> None:
    engine = LlamaEngine(gguf, n_threads=1)
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.generate(requests(), GREEDY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"stop": ("",)},
    ],
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("file_type", ["Q4_0", "Q4_K_M"])
def test_quantized_models_generate(file_type: str) -> None:
    path = quantized(tiny_model("llama", n_embd=256).gguf, file_type)
    with LlamaEngine(path, n_ctx=256, n_threads=1) as engine:
        found = completed(engine, DRAWN)
    assert len(found) == len(PROMPTS)
    assert all(completion.n_tokens for completion in found)


@pytest.mark.parametrize(("n_parallel", "many"), [(2, False), (15, False), (16, True), (32, True)])
def test_engine_of_many_texts_computes_many_tokens_at_once(
    n_parallel: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(*arguments: Any, optimize_for_batches: bool, **options: Any) -> Model:
        asked.append(optimize_for_batches)
        return Model(*arguments, **options)

    monkeypatch.setattr(llama_engine, "Model", watched)
    LlamaEngine(tiny_model("llama").gguf, n_parallel=n_parallel).close()
    assert asked == [many]


def test_no_requests_are_completed_at_once_also_where_a_whole_context_takes_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_engine, "_LEAST_CACHE_BYTES", 1)
    with LlamaEngine(tiny_model("llama").gguf, n_ctx=256, n_threads=1) as engine:
        assert list(engine.generate([], Sampling(max_tokens=4))) == []
