"""What steering costs: decoding and prefill under every form of an edit, over the same without.

Two contexts of one model, of which the second is steered, compute tokens, or prompts, in turns; the first one
under a form, for which llama.cpp makes a new graph, is left out. The noise is measured in the same way, with
nothing for a form.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bed import Bed, Pair, Sizes
from benchmarks.figures import Figure, Measured, ratio
from benchmarks.forms import BaseAndSteered, ChangingStrength, Form, NoEdit, Patch, Stock, additions, removal
from benchmarks.setting import Setting

if TYPE_CHECKING:
    from alignez_gguf.control.edits import Edits


def measure(setting: Setting, sizes: Sizes | None = None) -> Measured:
    """Ratios of times, steered over unsteered."""
    import llama_cpp

    from alignez_gguf.runtime.model import Model

    sizes = sizes or Sizes()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        model = opened.enter_context(Model(setting.model, n_gpu_layers=setting.n_gpu_layers))
        base, other, base_two, two = (
            opened.enter_context(Bed(model, setting, sizes, n_sequences)) for n_sequences in (1, 1, 2, 2)
        )
        rank_1 = removal(model.info, 1)
        pair = Pair(base, other, setting.pairs)
        found = _patched(pair, rank_1)
        found |= _stock(pair, rank_1, setting.model, folder)
        found |= _merged(base, rank_1, setting, folder)
        found |= _side_by_side(base, base_two, two, rank_1, setting)
        found |= _loaded_for_many(setting, sizes, rank_1)
    return Measured(found, {"llama-cpp-python": llama_cpp.__version__})


def _patched(pair: Pair, rank_1: Edits) -> dict[str, Figure]:
    context = pair.other.context
    first_steered = Patch(context, rank_1, first=pair.other.sizes.n_prefill - 1)
    rank_4 = removal(context.model.info, 4)
    changing, staying = ChangingStrength(context, rank_1), Patch(pair.base.context, rank_1)
    return (
        _both("", "the patch, rank 1", pair, Patch(context, rank_1), 1.01, 1.015)
        | _both("rank4_", "the patch, rank 4", pair, Patch(context, rank_4), 1.02, 1.02)
        | {
            "generation_prefill_ratio": _ratio(
                "prefill, the patch, scope generation", pair.prefill(first_steered)
            ),
            "changing_strength_ratio": _ratio(
                "decode, a new strength for every token over one that stays", pair.decode(changing, staying)
            ),
            "noise": _ratio("decode, base over base", pair.decode()),
            "prefill_noise": _ratio("prefill, base over base", pair.prefill()),
        }
    )


def _stock(pair: Pair, rank_1: Edits, path: Path, folder: Path) -> dict[str, Figure]:
    """The forms that need no patch."""
    from alignez_gguf.exporters import stock
    from alignez_gguf.exporters.weights import ModelWeights

    lora = folder / "lora.gguf"
    stock.write_lora(rank_1, ModelWeights(path), lora)
    context = pair.other.context
    added = Stock(context, additions=additions(context.model.info))
    return _both("lora_", "stock LoRA, rank 1", pair, Stock(context, lora=lora)) | _both(
        "control_vector_", "stock control vector", pair, added
    )


def _merged(base: Bed, rank_1: Edits, setting: Setting, folder: Path) -> dict[str, Figure]:
    """The edit in the weights, which may take wider types."""
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.exporters import merged
    from alignez_gguf.exporters.weights import ModelWeights
    from alignez_gguf.runtime.model import Model

    path = folder / "merged.gguf"
    merged.write(ControlFile(base.context.model.info, rank_1), ModelWeights(setting.model), path)
    with (
        Model(path, n_gpu_layers=setting.n_gpu_layers) as model,
        Bed(model, setting, base.sizes) as other,
    ):
        return _both("merged_", "merged model", Pair(base, other, setting.pairs), NoEdit())


def _side_by_side(base: Bed, base_two: Bed, two: Bed, rank_1: Edits, setting: Setting) -> dict[str, Figure]:
    """Base and steered text in one batch, as a comparing chat decodes them, over the base alone or twice."""
    form = BaseAndSteered(two.context, rank_1)
    over_one = Pair(base, two, setting.pairs).decode(form)
    over_two = Pair(base_two, two, setting.pairs).decode(form)
    return {
        "side_by_side_ratio": _ratio(
            "decode, base and steered in one batch over base alone", over_one, bound=1.25
        ),
        "side_by_side_steering_ratio": _ratio("decode, the same over base twice in one batch", over_two),
    }


def _loaded_for_many(setting: Setting, sizes: Sizes, rank_1: Edits) -> dict[str, Figure]:
    """The prefill of a model that is loaded as an engine of many texts loads it, perhaps a faster one."""
    from alignez_gguf.runtime.model import Model

    with (
        Model(setting.model, n_gpu_layers=setting.n_gpu_layers, optimize_for_batches=True) as model,
        Bed(model, setting, sizes) as base,
        Bed(model, setting, sizes) as other,
    ):
        taken = Pair(base, other, setting.pairs).prefill(Patch(other.context, rank_1))
        what = "prefill, the patch, rank 1, weights loaded for many tokens at once"
        return {"loaded_for_many_prefill_ratio": _ratio(what, taken)}


def _both(
    key: str,
    what: str,
    pair: Pair,
    form: Form,
    decode_bound: float | None = None,
    prefill_bound: float | None = None,
) -> dict[str, Figure]:
    return {
        f"{key}decode_ratio": _ratio(f"decode, {what}", pair.decode(form), bound=decode_bound),
        f"{key}prefill_ratio": _ratio(f"prefill, {what}", pair.prefill(form), bound=prefill_bound),
    }


def _ratio(meaning: str, taken: tuple[list[float], list[float]], bound: float | None = None) -> Figure:
    base, other = taken
    return ratio(meaning, other, base, bound=bound)
