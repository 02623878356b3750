"""What steering costs: decoding and prefill under every form of an edit, over the same without.

A pair is a run without and a run with the form on the same context, next to each other; changing the form,
and the token after it, in which llama.cpp makes a new graph, are left out of both. The noise is measured in
the same way, with nothing for a form.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benching.bed import Bed, Sizes, decode, open_context, prefill
from benching.figures import Figure, Measured, ratio
from benching.forms import ChangingStrength, Form, NoEdit, Patch, Stock, additions, removal
from benching.setting import Setting
from benching.timing import alternated, seconds

if TYPE_CHECKING:
    from alignez_gguf.edits import Edits
    from alignez_gguf.runtime.model import Model


def measure(setting: Setting, sizes: Sizes | None = None) -> Measured:
    """Ratios of times, steered over unsteered."""
    import llama_cpp

    from alignez_gguf.runtime.model import Model

    sizes = sizes or Sizes()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        model = opened.enter_context(Model(setting.model, n_gpu_layers=setting.n_gpu_layers))
        bed = opened.enter_context(Bed(model, setting, sizes))
        rank_1 = removal(model.info, 1)
        found = _patched(bed, rank_1)
        found |= _stock(bed, rank_1, setting.model, folder)
        found |= _merged(bed, rank_1, setting, folder)
        found |= _side_by_side(model, rank_1, setting, sizes)
    return Measured(found, {"llama-cpp-python": llama_cpp.__version__})


def _patched(bed: Bed, rank_1: Edits) -> dict[str, Figure]:
    context = bed.context
    first_steered = Patch(context, rank_1, bed.sizes.n_prefill - 1)
    rank_4 = Patch(context, removal(context.model.info, 4))
    return (
        _both("", "the patch, rank 1", bed, Patch(context, rank_1), 1.01, 1.015)
        | _both("rank4_", "the patch, rank 4", bed, rank_4, 1.02, 1.02)
        | {
            "generation_prefill_ratio": _cost(
                "prefill, the patch, scope generation", bed, first_steered, bed.prefill, None
            ),
            "changing_strength_ratio": _cost(
                "decode, a new strength for every token over one that stays",
                bed,
                ChangingStrength(context, rank_1),
                bed.decode,
                None,
            ),
            "noise": _cost("decode, base over base", bed, NoEdit(), bed.decode, None),
            "prefill_noise": _cost("prefill, base over base", bed, NoEdit(), bed.prefill, None),
        }
    )


def _stock(bed: Bed, rank_1: Edits, path: Path, folder: Path) -> dict[str, Figure]:
    """The forms that need no patch."""
    from alignez_gguf.exporters import stock
    from alignez_gguf.exporters.weights import ModelWeights

    lora = folder / "lora.gguf"
    stock.write_lora(rank_1, ModelWeights(path), lora)
    with (
        Stock(bed.context, lora=lora) as removes,
        Stock(bed.context, additions=additions(bed.context.model.info)) as adds,
    ):
        return _both("lora_", "stock LoRA, rank 1", bed, removes) | _both(
            "control_vector_", "stock control vector", bed, adds
        )


def _merged(bed: Bed, rank_1: Edits, setting: Setting, folder: Path) -> dict[str, Figure]:
    """The edit in the weights, which may take wider types."""
    from alignez_gguf.control import ControlFile
    from alignez_gguf.exporters import merged
    from alignez_gguf.exporters.weights import ModelWeights
    from alignez_gguf.runtime.model import Model

    path = folder / "merged.gguf"
    merged.write(ControlFile(bed.context.model.info, rank_1), ModelWeights(setting.model), path)
    nothing = NoEdit()
    with (
        Model(path, n_gpu_layers=setting.n_gpu_layers) as model,
        Bed(model, setting, bed.sizes, like=bed) as other,
    ):
        decoded = alternated(lambda: bed.decode(nothing), lambda: other.decode(nothing), bed.pairs)
        prefilled = alternated(lambda: bed.prefill(nothing), lambda: other.prefill(nothing), bed.pairs)
    return {
        "merged_decode_ratio": ratio("decode, merged model", decoded[1], decoded[0]),
        "merged_prefill_ratio": ratio("prefill, merged model", prefilled[1], prefilled[0]),
    }


def _side_by_side(model: Model, rank_1: Edits, setting: Setting, sizes: Sizes) -> dict[str, Figure]:
    """Base and steered text in one batch, as a comparing chat decodes them, over the base text alone."""
    from alignez_gguf.runtime import library

    with open_context(model, setting, sizes, n_sequences=2) as context:
        library.set_edits(context.pointer, rank_1, model.info.n_embd)
        library.set_strength(context.pointer, 0.0, sequence=0)

        def run(n_sequences: int, n_tokens: int) -> float:
            context.clear()
            for sequence in range(n_sequences):
                prefill(context, sizes.n_before - 1, sequence)
            decode(context, sizes.n_before - 1, n_sequences)
            positions = range(sizes.n_before, sizes.n_before + n_tokens)

            def decode_all() -> None:
                for position in positions:
                    decode(context, position, n_sequences)

            return seconds(decode_all)

        run(1, 1)
        n_tokens = sizes.n_decoded(run(1, 1))
        one, both = alternated(lambda: run(1, n_tokens), lambda: run(2, n_tokens), setting.pairs)
    return {
        "side_by_side_ratio": ratio(
            "decode, base and steered in one batch over base alone", both, one, bound=1.25
        )
    }


def _both(
    key: str,
    what: str,
    bed: Bed,
    form: Form,
    decode_bound: float | None = None,
    prefill_bound: float | None = None,
) -> dict[str, Figure]:
    return {
        f"{key}decode_ratio": _cost(f"decode, {what}", bed, form, bed.decode, decode_bound),
        f"{key}prefill_ratio": _cost(f"prefill, {what}", bed, form, bed.prefill, prefill_bound),
    }


def _cost(meaning: str, bed: Bed, form: Form, run: Callable[[Form], float], bound: float | None) -> Figure:
    without, with_form = bed.compare(form, run)
    return ratio(meaning, with_form, without, bound=bound)
