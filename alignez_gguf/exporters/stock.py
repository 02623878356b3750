"""The edits in the two forms that every llama.cpp loads: a LoRA that removes, a control vector that adds.

With V the removed rows and W the weight of `ffn_down`, the MLP output W h becomes W h - V^T (V W) h: a LoRA
with B = -V^T (B = V^T G with gains G) and A = V W, exact because W is the weight as the very file keeps it,
and because A is stored so that it meets the same h (`stacked`). Every expert of a mixture gets its own pair,
since the sum of what is left of each is what is left of the sum. The addition is the control vector as it is:
llama.cpp adds it at the output of the block (`build_cvec`).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import Edits, LayerEdit, edits_sha256
from alignez_gguf.errors import OutputError, SteeringError
from alignez_gguf.exporters.mlp_bias import residual_scale
from alignez_gguf.exporters.stacked import carrier, stack
from alignez_gguf.exporters.weights import DownProjection, ModelWeights
from alignez_gguf.progress import Reporter, SilentReporter
from alignez_gguf.storage.atomic import replacing

LORA_FORMAT_VERSION = 3
"""The version of the adapters; a cached adapter of another version is regenerated."""


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapted weight.

    Attributes:
        a: [k, n_ff], or [n_expert, k, n_ff].
        b: [n_embd, k], or [n_expert, n_embd, k].
        minima: what the minima of the weight's blocks contribute to A, [.., k, n_blocks]; `None` where the
            type has none.
    """

    a: NDArray[np.float64]
    b: NDArray[np.float32]
    minima: NDArray[np.float64] | None = None


def lora(edits: Edits, weights: ModelWeights, progress: Reporter | None = None) -> dict[str, LoraPair]:
    """Return the pairs that remove, by the name of the adapted weight; empty where nothing is removed.

    Raises:
        SteeringError: llama.cpp cannot adapt a weight; the message says which, and how to fix it.
        ModelFileError: a weight cannot be dequantised.
    """
    removed = {layer: edit for layer, edit in sorted(edits.items()) if edit.remove is not None}
    pairs: dict[str, LoraPair] = {}
    with (progress or SilentReporter()).stage("projecting ffn_down", len(removed)) as advance:
        for layer, edit in removed.items():
            for down in weights.down_projections(layer):
                pairs[down.weight.name] = _pair(down, edit)
            advance(1)
    return pairs


def additions(edits: Edits, weights: ModelWeights) -> dict[int, NDArray[np.float32]]:
    """The vectors [n_embd] that are added, by layer, from 1 on; empty where there are none.

    Raises:
        SteeringError: an addition at layer 0, or a constant that llama.cpp cannot be given.
    """
    _refuse_layer_0(edits)
    added = {}
    for layer, edit in sorted(edits.items()):
        total = np.zeros(weights.info.n_embd) if edit.add is None else edit.add.astype(np.float64)
        if edit.remove is not None:
            for down in weights.down_projections(layer):
                total += _constant(down, edit, weights)
        if edit.bias is not None:
            total += scale_of_constants(layer, weights) * edit.bias.astype(np.float64)
        if total.any():
            added[layer] = total.astype(np.float32)
    return added


def _refuse_layer_0(edits: Edits) -> None:
    # llama_adapter_cvec::init: "there's never a tensor for layer 0"
    edit = edits.get(0)
    if edit is not None and (edit.add is not None or edit.bias is not None):
        raise SteeringError(
            "the control adds at layer 0, which stock llama.cpp cannot do; export with --layers 1-, or use "
            "the patched runtime: alignez-gguf runtime build"
        )


def write(
    control: ControlFile, weights: ModelWeights, output: Path, progress: Reporter | None = None
) -> list[Path]:
    """Write OUT.lora.gguf and OUT.cvec.gguf, whichever is needed; OUT is `output` without `.gguf`.

    Raises:
        SteeringError, ModelFileError: as `lora` and `additions`.
        OutputError: a file cannot be written.
    """
    added = additions(control.edits, weights)
    stem = output.name.removesuffix(".gguf")
    written = []
    if any(edit.remove is not None for edit in control.edits.values()):
        written.append(output.with_name(f"{stem}.lora.gguf"))
        write_lora(control.edits, weights, written[-1], progress)
    if added:
        written.append(output.with_name(f"{stem}.cvec.gguf"))
        edits = {layer: LayerEdit(add=add) for layer, add in added.items()}
        ControlFile(weights.info, edits, recipe={**control.recipe, "form": "stock"}).save(written[-1])
    return written


def write_lora(edits: Edits, weights: ModelWeights, path: Path, progress: Reporter | None = None) -> None:
    """Write the LoRA that removes, atomically.

    Raises:
        SteeringError, ModelFileError: as `lora`.
        OutputError: the file cannot be written.
    """
    import gguf

    pairs = lora(edits, weights, progress)
    try:
        with replacing(path) as temporary:
            writer = gguf.GGUFWriter(temporary, weights.info.arch)
            try:
                writer.add_type(gguf.GGUFType.ADAPTER)
                writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
                # llama_adapter_lora_weight::get_scale: 0 is a scale of 1 whatever the rank, and ranks differ.
                writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
                writer.add_uint32("alignez.format_version", LORA_FORMAT_VERSION)
                writer.add_string("alignez.model.fingerprint", weights.info.fingerprint)
                writer.add_string("alignez.edits", edits_sha256(edits))
                for name, pair in pairs.items():
                    _add(writer, name, pair, weights.tensors[name].type)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose another place for the output"
        ) from error


def _add(writer: Any, name: str, pair: LoraPair, kind: Any) -> None:
    """Add the pair of a weight of type `kind` to a file: A as a stack where the weight is quantized."""
    try:
        stored = carrier(kind)
    except SteeringError as error:
        raise SteeringError(f"{name}: {error}") from error
    if stored is None:
        writer.add_tensor(f"{name}.lora_a", pair.a.astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", pair.b)
        return
    a = stack(pair.a, stored, pair.minima)
    writer.add_tensor(f"{name}.lora_a", a.rows, raw_dtype=stored)
    writer.add_tensor(f"{name}.lora_b", np.concatenate([scale * pair.b for scale in a.scales], axis=-1))


def command_line(model: Path, written: list[Path]) -> str:
    """How llama-server is started with the files that `write` wrote."""
    arguments: list[str] = []
    for path in written:
        arguments += ["--lora" if path.name.endswith(".lora.gguf") else "--control-vector", str(path)]
    return shlex.join(["llama-server", "-m", str(model), *arguments])


def _pair(down: DownProjection, edit: LayerEdit) -> LoraPair:
    """B = V^T G, which is -V^T for a removal, and A = V W of every expert."""
    assert edit.remove is not None
    a, minima = down.projected(edit.remove), down.projected_minima(edit.remove)
    scales = _lora_scales(down)[:, None, None]
    b = np.ascontiguousarray((edit.gains[:, None] * edit.remove).T)
    if down.kind == "dense":
        return LoraPair(a[0], b, None if minima is None else minima[0])
    return LoraPair(
        a * scales,
        np.broadcast_to(b, (down.n_expert, *b.shape)),
        None if minima is None else minima * scales,
    )


def _lora_scales(down: DownProjection) -> NDArray[np.float32]:
    """The scales that llama.cpp applies before it adds the LoRA (build_lora_mm_id in src/llama-graph.cpp)."""
    if down.weight.type.name == "NVFP4":
        raise SteeringError(
            f"{down.weight.name} is stored as NVFP4, which llama.cpp cannot combine with a LoRA; use another "
            "quantization, or the patched runtime: alignez-gguf runtime build"
        )
    scales = down.scales()
    if down.kind == "dense" and not np.all(scales == 1):
        # build_ffn scales after the LoRA, other builders before it
        raise SteeringError(
            f"{down.weight.name} has a scale of its own, which a LoRA meets differently from one "
            "architecture to the next; use --format merged, or the patched runtime: "
            "alignez-gguf runtime build"
        )
    return scales


def scale_of_constants(layer: int, weights: ModelWeights) -> float:
    """The factor between a constant at the MLP output of a layer and what it adds to the output of its block.

    Raises:
        SteeringError: a norm lies between the two.
    """
    info = weights.info
    if info.has_post_norm:
        raise SteeringError(
            f"the control adds to the MLP output of layer {layer}, and {info.arch} models have a norm behind "
            "it, where stock llama.cpp cannot add; use the patched runtime: alignez-gguf runtime build"
        )
    scale = weights.metadata.get(f"{info.arch}.residual_scale", 0.0)
    return float(scale) if isinstance(scale, (int, float)) and scale else 1.0


def _constant(down: DownProjection, edit: LayerEdit, weights: ModelWeights) -> NDArray[Any] | float:
    """Return what an edit of the bias b adds to the output of the block: V^T G V b, as the block scales it.

    A LoRA changes the weight alone.
    """
    biases = down.biases()
    if biases is None:
        return 0.0
    if down.layer == 0:
        raise SteeringError(
            "the ffn_down of layer 0 has a bias, and stock llama.cpp cannot add the constant that a removal "
            "there needs; export with --layers 1-, or use the patched runtime: alignez-gguf runtime build"
        )
    scale = residual_scale(weights.info.arch, weights.metadata)
    if down.kind == "experts" or scale is None:
        reason = (
            "a bias of each expert, which is weighted by the routing of each token"
            if down.kind == "experts"
            else "a bias, and the architecture may change it before it reaches the residual stream"
        )
        raise SteeringError(
            f"the ffn_down of layer {down.layer} has {reason}; stock llama.cpp cannot remove anything from "
            "it: use --format merged, or the patched runtime: alignez-gguf runtime build"
        )
    assert edit.remove is not None
    v = edit.remove.astype(np.float64)
    result: NDArray[Any] = scale * (edit.gains * (v @ biases[0])) @ v
    return result
