"""How the cost of each stage grows with 2, 4 and 8 times the queries, pairs or layers, on small models.

A figure is the time of the larger task over what the straight line through the smallest one says: 1 is
linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, Measured, ratio
from benchmarks.forms import removal
from benchmarks.make_bench_model import Shape, make
from benchmarks.setting import SLACK, Setting, texts
from benchmarks.timing import seconds

if TYPE_CHECKING:
    from alignez_gguf.engines.llama.engine import LlamaEngine

FACTORS = (1, 2, 4, 8)
_LEVEL = "Q8_0"
_ANSWER = " make a plan and mind the oven"
_EDITS = 4
_BOUND = 1.0

_SHAPE = Shape(4, 512, 1536, 8, 4, n_vocab=4096)

Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """The smallest task of each kind.

    Attributes:
        shape: of the model; what does not grow with the layers is measured on it.
        n_generated, n_read, n_selected, n_fitted: answers, passages, queries and pairs.
        n_tokens: of a prompt.
        n_shared: tokens that all prompts begin with, as those of one template do.
        n_answer: tokens of an answer.
    """

    shape: Shape = _SHAPE
    n_generated: int = 32
    n_read: int = 8
    n_selected: int = 8
    n_fitted: int = 32
    n_tokens: int = 64
    n_shared: int = 48
    n_answer: int = 32

    def prompts(self, engine: LlamaEngine, count: int) -> list[str]:
        """As many different ones."""
        return texts(engine.model.tokenize, count, self.n_tokens, n_shared=self.n_shared)


def measure(setting: Setting, sizes: Sizes | None = None) -> Measured:
    """Times of generation, reading, selection and fit against the straight line."""
    import alignez_gguf

    sizes = sizes or Sizes()
    figures: dict[str, Figure] = {}
    with ExitStack() as opened:
        engines = {
            factor: opened.enter_context(_engine(setting, sizes, factor * sizes.shape.n_layer))
            for factor in FACTORS
        }
        small = engines[1]
        tasks: Mapping[str, Callable[[int], Work]] = {
            "generation_queries": lambda factor: _generation(small, sizes, factor),
            "reading_pairs": lambda factor: _reading(small, sizes, factor * sizes.n_read),
            "selection_queries": lambda factor: _selection(small, sizes, factor * sizes.n_selected),
            "fit_pairs": lambda factor: _fit(sizes, 1, factor),
            "reading_layers": lambda factor: _reading(engines[factor], sizes, sizes.n_read),
            "selection_layers": lambda factor: _selection(engines[factor], sizes, sizes.n_selected),
            "fit_layers": lambda factor: _fit(sizes, factor, 1),
        }
        for name, task in tasks.items():
            figures |= against_line(name, task, max(setting.repeats, 3))
    return Measured(figures, {"alignez-gguf": alignez_gguf.__version__})


def against_line(name: str, task: Callable[[int], Work], repeats: int) -> dict[str, Figure]:
    """The figures of a task, called STAGE_UNIT: `task` gives the work of so many times the smallest one."""
    works = {factor: task(factor) for factor in FACTORS}
    taken: dict[int, list[float]] = {factor: [] for factor in FACTORS}
    works[1]()
    for _ in range(repeats):
        for factor, work in works.items():
            taken[factor].append(seconds(work))
    stage, unit = name.split("_")
    return {
        f"{name}_{factor}x": ratio(
            f"{stage}, {factor} times the {unit}, over {factor} times the time",
            taken[factor],
            [factor * one for one in taken[1]],
            bound=_BOUND,
        )
        for factor in FACTORS[1:]
    }


def _engine(setting: Setting, sizes: Sizes, n_layer: int) -> LlamaEngine:
    from alignez_gguf.engines.llama.engine import LlamaEngine

    cache: Path = setting.cache / "growth"
    return LlamaEngine(
        make(replace(sizes.shape, n_layer=n_layer), _LEVEL, cache),
        n_ctx=sizes.n_tokens + sizes.n_answer + SLACK,
        n_threads=setting.n_threads,
        n_gpu_layers=setting.n_gpu_layers,
    )


def _generation(engine: LlamaEngine, sizes: Sizes, factor: int) -> Work:
    from alignez_gguf.engines.base import GenerationRequest, Sampling

    prompts = sizes.prompts(engine, factor * sizes.n_generated)
    requests = [GenerationRequest(prompt, seed) for seed, prompt in enumerate(prompts)]
    return lambda: list(engine.generate(requests, Sampling(max_tokens=sizes.n_answer)))


def _reading(engine: LlamaEngine, sizes: Sizes, count: int) -> Work:
    from alignez_gguf.engines.base import Passage
    from alignez_gguf.readout import Readout

    passages = [Passage(prompt) for prompt in sizes.prompts(engine, count)]
    return lambda: list(engine.activations(passages, [Readout()]))


def _selection(engine: LlamaEngine, sizes: Sizes, count: int) -> Work:
    """Prompts into the cache, and the likelihood of an answer to each under a few edits."""
    from alignez_gguf.engines.base import Passage

    passages = [Passage(prompt, _ANSWER) for prompt in sizes.prompts(engine, count)]
    candidates = [removal(engine.info, rank) for rank in range(1, 1 + _EDITS)]

    def select() -> None:
        with engine.steered(passages) as steered:
            for edits in candidates:
                steered.log_likelihoods(edits, range(len(passages)))

    return select


def _fit(sizes: Sizes, layers: int, pairs: int) -> Work:
    import numpy as np

    from alignez_gguf import directions

    shape = (layers * sizes.shape.n_layer, pairs * sizes.n_fitted, sizes.shape.n_embd)
    rng = np.random.default_rng(0)
    helpful, harmful = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return lambda: directions.fit("ccs", helpful, harmful)
