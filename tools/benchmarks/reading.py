"""Reading the activations of all layers: against the same prompts unread, and against who else reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benchmarks import programs
from benchmarks.figures import Figure, Measured, missing, ratio
from benchmarks.repeng_parent import Repeng, RepengError
from benchmarks.setting import SLACK, Setting, texts
from benchmarks.timing import alternated, seconds

if TYPE_CHECKING:
    from alignez_gguf.engines.llama.engine import LlamaEngine

_PROGRAM = programs.CVECTOR_GENERATOR


@dataclass(frozen=True)
class Sizes:
    """Prompts, an even number of them, and tokens of each."""

    n_prompts: int = 16
    n_tokens: int = 96


def measure(setting: Setting, sizes: Sizes | None = None) -> Measured:
    """Tokens/s of reading the last token of prompts at every layer; nothing is shared between them."""
    from alignez_gguf.engines.llama.engine import LlamaEngine

    sizes = sizes or Sizes()
    with LlamaEngine(
        setting.model,
        n_ctx=sizes.n_tokens + SLACK,
        n_threads=setting.n_threads,
        n_gpu_layers=setting.n_gpu_layers,
    ) as engine:
        prompts = texts(engine.model.tokenize, sizes.n_prompts, sizes.n_tokens)
        reader = _Reader(engine, prompts)
        reader.read("mlp")  # the first time it looks for the outputs in the graph
        figures, anchors = _in_process(reader, setting)
        figures["vs_cvector_generator"] = _against_program(reader, setting, anchors)
        figures |= _against_repeng(reader, setting, anchors)
    return Measured(figures, anchors)


class _Reader:
    """The ways to compute the prompts in this process; each gives tokens/s."""

    def __init__(self, engine: LlamaEngine, prompts: Sequence[str]) -> None:
        self.engine = engine
        self.prompts = prompts
        self.tokens = [engine.model.tokenize(prompt) for prompt in prompts]

    def read(self, hook: Literal["mlp", "residual"]) -> float:
        from alignez_gguf.engines.base import Passage
        from alignez_gguf.readout import Readout

        passages = [Passage(prompt) for prompt in self.prompts]
        return self.speed(lambda: list(self.engine.activations(passages, [Readout(hook)])))

    def plain(self) -> float:
        return self.speed(lambda: list(self.engine.next_token_logprobs(self.prompts)))

    def speed(self, work: Callable[[], object]) -> float:
        return sum(map(len, self.tokens)) / seconds(work)


def _in_process(reader: _Reader, setting: Setting) -> tuple[dict[str, Figure], dict[str, str]]:
    """Against the same pieces of the same prompts unread, and against each prompt in one piece."""
    import llama_cpp

    from alignez_gguf.runtime.context import Context

    pairs = max(setting.repeats, 3)
    with Context(
        reader.engine.model, n_ctx=max(map(len, reader.tokens)), n_threads=setting.n_threads
    ) as context:

        def prefill() -> None:
            for tokens in reader.tokens:
                context.clear()
                wanted = [False] * (len(tokens) - 1) + [True]
                context.decode(tokens, range(len(tokens)), [0] * len(tokens), wanted)
                context.logits(len(tokens) - 1)  # waits for a GPU

        mlp, plain = alternated(lambda: reader.read("mlp"), reader.plain, pairs)
        residual, plain_again = alternated(lambda: reader.read("residual"), reader.plain, pairs)
        ours, whole = alternated(lambda: reader.read("mlp"), lambda: reader.speed(prefill), pairs)
    figures = {
        "vs_prefill": ratio(
            "tokens/s, MLP outputs, over the same without reading", mlp, plain, better="higher", bound=0.97
        ),
        "vs_prefill_residual": ratio(
            "the same of the residual stream", residual, plain_again, better="higher", bound=0.97
        ),
        "vs_llama_decode": ratio(
            "tokens/s, MLP outputs, over llama_decode of each whole prompt", ours, whole, better="higher"
        ),
    }
    return figures, {"llama-cpp-python": llama_cpp.__version__}


def _against_program(reader: _Reader, setting: Setting, anchors: dict[str, str]) -> Figure:
    meaning = f"tokens/s, residual stream, over {_PROGRAM}"
    program = programs.find(setting, _PROGRAM)
    if program is None:
        return missing(meaning, programs.NOT_BUILT, better="higher", bound=1.0)
    anchors[_PROGRAM] = program.version
    ours, theirs = alternated(
        lambda: reader.read("residual"),
        lambda: programs.cvector_generator(program, reader.prompts),
        setting.repeats,
    )
    return ratio(meaning, ours, theirs, better="higher", bound=1.0)


def _against_repeng(reader: _Reader, setting: Setting, anchors: dict[str, str]) -> dict[str, Figure]:
    """Against repeng; where it is not installed, against the same computation by transformers."""
    meaning = "tokens/s, residual stream, over repeng on a transformers model of this shape"
    try:
        repeng = Repeng.fastest(reader.engine.model, len(reader.prompts), len(reader.tokens[0]))
    except RepengError as error:
        return {"vs_repeng": missing(meaning, str(error), better="higher", bound=1.0)}
    with repeng:
        ours, theirs = alternated(lambda: reader.read("residual"), repeng.speed, setting.repeats)
    anchors |= repeng.versions
    if repeng.is_repeng:
        return {"vs_repeng": ratio(f"{meaning}, {repeng.dtype}", ours, theirs, better="higher", bound=1.0)}
    return {
        "vs_repeng": missing(meaning, "repeng is not installed", better="higher", bound=1.0),
        "vs_transformers": ratio(
            f"tokens/s, residual stream, over transformers as repeng calls it, {repeng.dtype}",
            ours,
            theirs,
            better="higher",
        ),
    }
