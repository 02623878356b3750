"""Checks that a control acts on this machine, with this llama.cpp, as its numbers say.

Each edited layer is edited alone (`layer_check`), then all of them together. Their changes are compared with
those of rounding alone on this machine (`rounding`), and the patch with the stock form. All
comparisons are made token by token, and the middle token decides: real models have tokens, the first one
above all, whose hidden states are a hundred times larger than the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import Edits
from alignez_gguf.errors import AlignezError
from alignez_gguf.progress import Reporter, SilentReporter
from alignez_gguf.verification.layer_check import FLOOR, TOLERANCE, LayerCheck, LayerChecker, lost_in_rounding
from alignez_gguf.verification.rounding import EffectShare, logits_distance, median_and_worst, rounding_floor

if TYPE_CHECKING:
    from alignez_gguf.verification.session import VerificationSession, Way

PROMPT = "Question: how do I bake a cake?\nAnswer:"

_N_PROMPT, _N_ANSWER = 16, 24


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        ok: every layer acts, all of them together change the logits by more than rounding does, off is off,
            and the stock form holds, if there is one.
        reason: the reason why it is not ok; empty where it is.
        runtime: how the edits reached llama.cpp.
        architecture: the architecture of the model.
        off_bit_identical: whether the logits are those of the model at strength 0 and after the edits.
        layers: the checks of the edited layers.
        stock_holds: patched and stock agree, in every layer and in the logits; `None` where only one works.
        patched_stock_max_diff: largest difference of the logits of both ways; `None` where only one works.
        patched_stock_share, patched_stock_share_worst: root mean square difference of the logits of both ways
            as a share of the effect, of the middle token and of the worst one.
        patched_stock_note: the reason why only one works; empty where the two do.
        logits_change: largest difference of the logits, steered to unsteered.
        effect: root mean square over the vocabulary of the change of the logits, of the middle token.
        rounding: what rounding alone changes, measured in the same way.
        floor, floor_worst: the same as a share of the effect, of the middle token and of the worst one;
            `None` where no layer can be edited.
        prompt: the text of which at most 16 tokens were decoded.
        text_unsteered, text_steered: its greedy continuations.
    """

    ok: bool
    reason: str
    runtime: Way
    architecture: str
    off_bit_identical: bool
    layers: tuple[LayerCheck, ...]
    stock_holds: bool | None
    patched_stock_max_diff: float | None
    patched_stock_share: float | None
    patched_stock_share_worst: float | None
    patched_stock_note: str
    logits_change: float
    effect: float
    rounding: float
    floor: float | None
    floor_worst: float | None
    prompt: str
    text_unsteered: str
    text_steered: str


def verify(
    model_path: str | PathLike[str],
    control: ControlFile,
    *,
    runtime: Literal["auto", "patched", "stock"] = "auto",
    prompt: str = PROMPT,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    progress: Reporter | None = None,
) -> Verification:
    """Check a control against its model, layer by layer.

    Args:
        model_path: the GGUF file of the model.
        control: the control file.
        runtime: how the edits reach llama.cpp; "auto" is through the patch where it is installed.
        prompt: the text whose hidden states are compared.
        n_threads: number of threads; None is the number of physical cores.
        n_gpu_layers: number of layers on the GPU; -1 is all.
        progress: shows the stages.

    Raises:
        ModelFileError: the model cannot be loaded.
        ControlFileError: the control is for another model.
        RuntimeUnavailableError: there is no llama.cpp, or it lacks the patch that `runtime` asks for.
        QueryError: the prompt is empty.
    """
    from alignez_gguf.runtime import bindings

    if runtime == "patched":
        bindings.require_patched()
    way: Way = "patched" if runtime != "stock" and bindings.is_patched() else "stock"
    from alignez_gguf.verification.session import (
        VerificationSession,  # imports llama_cpp, so not before it is known to be there
    )

    with VerificationSession(
        model_path,
        prompt,
        n_prompt=_N_PROMPT,
        n_answer=_N_ANSWER,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
    ) as session:
        control.check_fits(session.info)
        return _verified(session, control.edits, way, prompt, progress or SilentReporter())


def _verified(
    session: VerificationSession, edits: Edits, way: Way, prompt: str, progress: Reporter
) -> Verification:
    base_logits, base = session.observe()
    text = steered_text = session.greedy()
    layers = LayerChecker(session, base_logits, base, rounding_floor(session, way, base_logits, base))
    checks = []
    with progress.stage("checking layers", len(edits)) as advance:
        for layer, edit in edits.items():
            checks.append(layers.check(way, layer, edit))
            advance(1)
    steered, floor = base_logits, layers.floor.logits
    settable = {check.layer: edits[check.layer] for check in checks if check.floor is not None}
    off, share = bool(settable), None
    if settable:
        with session.steered(way, settable) as backend:
            steered = session.logits()
            floor = np.maximum(floor, logits_distance(session.logits(at_once=1), steered))
            steered_text = session.greedy()
            session.set_strength(backend, 0.0)
            off = np.array_equal(session.logits(), base_logits)
        off = off and np.array_equal(session.logits(), base_logits)
        share = EffectShare.of(floor, logits_distance(steered, base_logits))
    ways = _WayComparison("not every layer acts")
    if all(check.acts for check in checks):
        ways = _compare_ways(layers, edits, way, steered, progress)
        checks = [_with_stock_form(check, ways.layers.get(check.layer)) for check in checks]
    reason = _reason(checks, share, off, ways, way)
    of_floor, of_ways = median_and_worst(share), median_and_worst(ways.share)
    return Verification(
        ok=not reason,
        reason=reason,
        runtime=way,
        architecture=session.info.arch,
        off_bit_identical=off,
        layers=tuple(checks),
        stock_holds=ways.hold,
        patched_stock_max_diff=ways.largest,
        patched_stock_share=of_ways[0],
        patched_stock_share_worst=of_ways[1],
        patched_stock_note=ways.note,
        logits_change=_largest(steered, base_logits),
        effect=float(np.median(logits_distance(steered, base_logits))),
        rounding=float(np.median(floor)),
        floor=of_floor[0],
        floor_worst=of_floor[1],
        prompt=prompt,
        text_unsteered=text,
        text_steered=steered_text,
    )


def _reason(
    checks: Sequence[LayerCheck], share: EffectShare | None, off: bool, ways: _WayComparison, way: Way
) -> str:
    """Return the reason why a control is not ok in one line, or "" where it is."""
    idle = [check for check in checks if not check.acts]
    if idle:
        return f"layers {', '.join(str(check.layer) for check in idle)} do not act: {idle[0].reason}"
    if share is None:
        return "it edits no layer"
    if not share.median < FLOOR:
        return lost_in_rounding(share.median)
    if not off:
        return "strength 0 is not off"
    if ways.hold is False:
        held = (
            "the patched runtime holds, the stock form (--runtime stock, convert --format stock) does not"
            if way == "patched"
            else "the stock form differs from the patched runtime"
        )
        return f"{held}: {ways.note}"
    return ""


def _with_stock_form(check: LayerCheck, stock: LayerCheck | None) -> LayerCheck:
    if stock is None:
        return check
    return replace(check, stock_error=stock.error, stock_error_worst=stock.error_worst)


@dataclass(frozen=True, eq=False)
class _WayComparison:
    """The comparison of the way of the edits with the other one; `note` says why it fails or is missing."""

    note: str = ""
    hold: bool | None = None
    largest: float | None = None
    share: EffectShare | None = None
    layers: Mapping[int, LayerCheck] = field(default_factory=dict)


def _compare_ways(
    layers: LayerChecker, edits: Edits, way: Way, steered: NDArray[np.float32], progress: Reporter
) -> _WayComparison:
    session, other = layers.session, _OTHER[way]
    try:
        with session.steered(other, edits):
            logits = session.logits()
            floor = np.maximum(layers.floor.logits, logits_distance(session.logits(at_once=1), logits))
    except AlignezError as error:
        return _WayComparison(str(error))
    effect = logits_distance(steered, layers.base_logits)
    difference = logits_distance(logits, steered)
    share, explained = EffectShare.of(difference, effect), EffectShare.of(floor, effect)
    checks: dict[int, LayerCheck] = {}
    note = ""
    if other == "stock":
        with progress.stage("checking the stock form", len(edits)) as advance:
            for layer, edit in edits.items():
                checks[layer] = check = layers.check(other, layer, edit)
                note = note or (check.reason and f"in layer {layer}, {check.reason}")
                advance(1)
    # Where the two round differently anywhere, they are as far apart as two runs of the floor.
    if not note and not share.median <= max(TOLERANCE, 2 * explained.median):
        note = (
            f"their logits differ by {share.median:.0%} of what the edit changes, of which rounding alone "
            f"explains {explained.median:.0%}"
        )
    return _WayComparison(note, not note, _largest(logits, steered), share, checks)


_OTHER: dict[Way, Way] = {"patched": "stock", "stock": "patched"}


def _largest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max())
