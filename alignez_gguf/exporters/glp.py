"""The removals as a GLP file ("GGUF Layer Projection"), for ds4 and other readers that project at run time.

Directions are `direction.N` and, of a rank above 1, `direction.N.j`, unit vectors both. The names are those
of llama.cpp's control vectors, so stock llama.cpp would add what has to be removed; a guard tensor of another
name makes it refuse the file (common_control_vector_load_one in common/common.cpp). Format: spec/GLP.md of
msuiche/weightless, versions 1 (rank 1) and 2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.errors import OutputError, SteeringError
from alignez_gguf.storage.atomic import replacing

HOOK = "ffn_out_pre_residual"
"""GLP's name for the MLP output."""

GUARD = "guard.project_do_not_add"


def write(control: ControlFile, output: Path) -> list[Path]:
    """Write the GLP file atomically, and return its path.

    Raises:
        SteeringError: the control adds, edits layer 0, or has layers of different rank.
        OutputError: the file cannot be written.
    """
    rank = _checked_rank(control)
    try:
        with replacing(output) as temporary:
            _write(control, rank, temporary)
    except OSError as error:
        raise OutputError(
            f"cannot write {output}: {error.strerror or error}; choose another place for the output"
        ) from error
    return [output]


def _checked_rank(control: ControlFile) -> int:
    boosting = [layer for layer, edit in control.edits.items() if edit.gain is not None]
    if boosting:
        raise SteeringError(
            f"the control boosts at layer {boosting[0]}, and a GLP file removes; use --format stock"
        )
    adding = [layer for layer, edit in control.edits.items() if edit.decision.endswith("add")]
    if adding:
        raise SteeringError(
            f"the control adds at layer {adding[0]}, and a GLP file either removes or adds; use --format "
            "stock, or export a control that only removes"
        )
    if 0 in control.edits:
        raise SteeringError("a GLP file cannot edit layer 0, and the control does; export with --layers 1-")
    ranks = {edit.rank for edit in control.edits.values()}
    if len(ranks) > 1:
        raise SteeringError(
            f"a GLP file has one rank for all layers, and the control has {sorted(ranks)}; use --format stock"
        )
    return ranks.pop()


def _write(control: ControlFile, rank: int, path: Path) -> None:
    import gguf

    layers = sorted(control.edits)
    writer = gguf.GGUFWriter(path, "controlvector")
    try:
        writer.add_string("controlvector.model_hint", control.model.arch)
        writer.add_uint32("controlvector.layer_count", len(layers))
        if control.model.name:
            writer.add_uint32("general.base_model.count", 1)
            writer.add_string("general.base_model.0.name", control.model.name)
        writer.add_uint32("glp.spec_version", 1 if rank == 1 else 2)
        writer.add_string("glp.generator", "alignez-gguf")
        writer.add_string("glp.mode", "project")
        writer.add_float32("glp.alpha_default", 1.0)
        writer.add_uint32("glp.rank", rank)
        writer.add_bool("glp.orthonormal", True)
        writer.add_string("glp.hook_point", HOOK)
        writer.add_string("glp.derived_at", HOOK)
        writer.add_string("glp.layer_ids_zero_based", ",".join(map(str, layers)))
        for layer in layers:
            vectors = control.edits[layer].remove
            assert vectors is not None
            for j, vector in enumerate(vectors):
                writer.add_tensor(f"direction.{layer}.{j}" if j else f"direction.{layer}", vector)
        writer.add_tensor(GUARD, np.ones(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
