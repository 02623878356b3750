"""What a change of strength or of control file costs a script that holds a `Llama`, and the token after it.

A prompt stays in the cache. The scope is generation, so that a changed edit has one token to compute anew.
The unsteered request that this is held against ends with another token, since the same prompt would be
answered without computing any (`exact_prompt_cached` in llama_cpp/llama.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, Measured, quantity, ratio
from benchmarks.forms import removal
from benchmarks.setting import Setting, texts
from benchmarks.timing import alternated, seconds

if TYPE_CHECKING:
    from llama_cpp import Llama

    from alignez_gguf.control.model_info import ModelInfo
    from alignez_gguf.steering.steer import Steering

_MILLISECONDS = 1000.0


@dataclass(frozen=True)
class Sizes:
    """Tokens of a prompt."""

    n_prompt: int = 64


def measure(setting: Setting, sizes: Sizes | None = None) -> Measured:
    """Milliseconds of the change itself, and ratios of the time to the first token after it."""
    import llama_cpp

    from alignez_gguf.control.model_info import ModelInfo

    sizes = sizes or Sizes()
    llm = setting.open_llama()
    info = ModelInfo.from_gguf(setting.model)
    with tempfile.TemporaryDirectory() as folder, closing(llm):

        def tokenize(text: str) -> list[int]:
            return llm.tokenize(text.encode())

        prompts = texts(tokenize, 2 * setting.pairs + 1, sizes.n_prompt)
        bench = Switches(llm, two_controls(info, Path(folder)), list(map(tokenize, prompts)), setting.pairs)
        figures = {
            "first_token_ratio": bench.ratio(
                "first token of a new prompt, steered over not", bench.new_prompt, bench.new_unsteered
            ),
            "after_strength_ratio": bench.ratio(
                "first token after a change of strength over an unsteered one", bench.after_strength
            ),
            "after_file_ratio": bench.ratio(
                "first token after a change of control file over an unsteered one", bench.after_file
            ),
            "noise": bench.ratio("unsteered over unsteered", bench.unsteered),
            "strength_ms": quantity("a change of strength itself", bench.strength_ms, " ms"),
            "switch_ms": quantity("a change of control file itself, read from disk", bench.file_ms, " ms"),
        }
    return Measured(figures, {"llama-cpp-python": llama_cpp.__version__})


def two_controls(info: ModelInfo, folder: Path) -> list[Path]:
    """Control files of rank 1 and 2."""
    from alignez_gguf.control.control_file import ControlFile

    controls = [folder / f"rank-{rank}.gguf" for rank in (1, 2)]
    for rank, path in enumerate(controls, 1):
        ControlFile(info, removal(info, rank)).save(path)
    return controls


class Switches:
    """Times the first token of a request, of a kept prompt or a new one, and the changes before it."""

    def __init__(
        self, llm: Llama, controls: Sequence[Path], prompts: Sequence[list[int]], pairs: int
    ) -> None:
        self._llm = llm
        self._controls = controls
        self._kept, *new = prompts
        self._new = iter(new)
        self._pairs = pairs
        self.strength_ms: list[float] = []
        self.file_ms: list[float] = []

    def ratio(
        self, meaning: str, other: Callable[[], float], base: Callable[[], float] | None = None
    ) -> Figure:
        """The time of another first token over that of an unsteered one, by default of the kept prompt."""
        without, with_edit = alternated(base or self.unsteered, other, self._pairs)
        return ratio(meaning, with_edit, without)

    def unsteered(self) -> float:
        """Of the kept prompt with another last token, which alone is computed."""
        self._token(self._kept)
        *before, last = self._kept
        return self._token([*before, last - 1])

    def new_unsteered(self) -> float:
        """Of a new prompt."""
        self._token(self._kept)
        return self._token(next(self._new))

    def new_prompt(self) -> float:
        """Of a new prompt, steered; the steering has been used before."""
        with self._steered(0):
            self._token(self._kept)
            return self._token(next(self._new))

    def after_strength(self) -> float:
        """Of the kept prompt, at another strength than it was just answered with."""
        with self._steered(0) as steering:
            self._token(self._kept)

            def change() -> None:
                steering.strength = 0.5

            self.strength_ms.append(_MILLISECONDS * seconds(change))
            return self._token(self._kept)

    def after_file(self) -> float:
        """Of the kept prompt, under another control file than it was just answered with."""
        steering = self._steered(0)
        self._token(self._kept)

        def change() -> None:
            nonlocal steering
            steering.remove()
            steering = self._steered(1)

        self.file_ms.append(_MILLISECONDS * seconds(change))
        with steering:
            return self._token(self._kept)

    def _steered(self, which: int) -> Steering:
        from alignez_gguf import steer

        return steer(self._llm, self._controls[which])

    def _token(self, prompt: list[int]) -> float:
        return seconds(lambda: self._llm(prompt, max_tokens=1))
