"""Self-generated answers, many at once: against a loop, against batched-bench, and against bare decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignez_gguf.engines.base import DEFAULT_N_PARALLEL
from benchmarks import programs
from benchmarks.figures import Measured, missing, quantity, ratio
from benchmarks.setting import SLACK, Setting, texts
from benchmarks.timing import seconds

if TYPE_CHECKING:
    from llama_cpp import Llama

    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.runtime.context import Context

_PROGRAM = programs.BATCHED_BENCH
_VS_PROGRAM = f"tokens/s over {_PROGRAM}, as many tokens of prompts and answers"


@dataclass(frozen=True)
class Sizes:
    """Answers at once; tokens that all prompts begin with, of a prompt, of an answer; answers of the loop."""

    n_parallel: int = DEFAULT_N_PARALLEL
    n_shared: int = 64
    n_prompt: int = 96
    n_answer: int = 128
    looped: int = 2

    @property
    def n_computed(self) -> int:
        """Tokens of a prompt that have to be computed, where what all share is computed once."""
        return self.n_prompt - self.n_shared + round(self.n_shared / self.n_parallel)


def measure(setting: Setting, sizes: Sizes | None = None) -> Measured:
    """Tokens/s of answers, the time of their prompts included."""
    import llama_cpp

    from alignez_gguf.engines.llama.engine import LlamaEngine

    sizes = sizes or Sizes()
    limit = programs.find(setting, _PROGRAM)
    ours, looped, bare, batched = [], [], [], []
    with LlamaEngine(
        setting.model,
        n_ctx=sizes.n_prompt + sizes.n_answer + SLACK,
        n_parallel=sizes.n_parallel,
        n_threads=setting.n_threads,
        n_gpu_layers=setting.n_gpu_layers,
    ) as engine:
        prompts = texts(engine.model.tokenize, sizes.n_parallel, sizes.n_prompt, n_shared=sizes.n_shared)
        loop = setting.open_llama()
        for repeat in range(setting.repeats):
            ours.append(_together(engine, prompts, sizes, repeat))
            looped.append(_one_by_one(loop, prompts[: sizes.looped], sizes))
            bare.append(_bare(engine, prompts, sizes, setting.n_threads))
            if limit is not None:
                batched.append(
                    programs.batched_bench(limit, sizes.n_computed, sizes.n_answer, sizes.n_parallel)
                )
        loop.close()
    figures = {
        "tokens_per_second": quantity(
            f"{sizes.n_parallel} answers at once", ours, " tokens/s", better="higher"
        ),
        "vs_loop": ratio(
            "tokens/s over a loop over Llama.__call__", ours, looped, better="higher", bound=5.0
        ),
        "vs_batched_bench": ratio(_VS_PROGRAM, ours, batched, better="higher", bound=0.9)
        if batched
        else missing(_VS_PROGRAM, programs.NOT_BUILT, better="higher", bound=0.9),
        "vs_bare_decoding": ratio(
            "tokens/s over nothing but llama_decode in the same context", ours, bare, better="higher"
        ),
    }
    anchors = {"llama-cpp-python": llama_cpp.__version__}
    if limit is not None:
        anchors[_PROGRAM] = limit.version
    return Measured(figures, anchors)


def _together(engine: LlamaEngine, prompts: Sequence[str], sizes: Sizes, repeat: int) -> float:
    from alignez_gguf.engines.base import GenerationRequest, Sampling

    requests = [
        GenerationRequest(prompt, repeat * len(prompts) + index) for index, prompt in enumerate(prompts)
    ]
    n_tokens = 0

    def generate() -> None:
        nonlocal n_tokens
        completions = engine.generate(requests, Sampling(max_tokens=sizes.n_answer))
        n_tokens = sum(completion.n_tokens for _, completion in completions)

    taken = seconds(generate)
    return n_tokens / taken


def _one_by_one(loop: Llama, prompts: Sequence[str], sizes: Sizes) -> float:
    n_tokens = 0

    def generate() -> None:
        nonlocal n_tokens
        for prompt in prompts:
            answer = loop(prompt, max_tokens=sizes.n_answer, temperature=1.0)
            n_tokens += answer["usage"]["completion_tokens"]

    taken = seconds(generate)
    return n_tokens / taken


def _bare(engine: LlamaEngine, prompts: Sequence[str], sizes: Sizes, n_threads: int) -> float:
    """What the sequences cost if nothing is sampled and no text is made: the prompts, then a token each."""
    from alignez_gguf.runtime.context import Context

    tokens = [engine.model.tokenize(prompt) for prompt in prompts]
    with Context(
        engine.model,
        n_ctx=max(map(len, tokens)) + sizes.n_answer,
        n_sequences=len(prompts),
        n_threads=n_threads,
    ) as context:
        taken = seconds(lambda: _decode_all(context, tokens, sizes))
    return len(prompts) * sizes.n_answer / taken


def _decode_all(context: Context, prompts: Sequence[list[int]], sizes: Sizes) -> None:
    for sequence, prompt in enumerate(prompts):
        first = 0
        if sequence > 0:
            first = next(i for i, (a, b) in enumerate(zip(prompts[0], prompt, strict=False)) if a != b)
            context.copy_sequence(0, sequence)
            context.truncate_sequence(sequence, first)
        rest = prompt[first:]
        wanted = [False] * (len(rest) - 1) + [True]
        context.decode(rest, range(first, len(prompt)), [sequence] * len(rest), wanted)
    count = len(prompts)
    for step in range(sizes.n_answer - 1):
        positions = [len(prompt) + step for prompt in prompts]
        context.decode([prompts[0][-1]] * count, positions, range(count), [True] * count)
    context.logits(count - 1)  # waits for a GPU
