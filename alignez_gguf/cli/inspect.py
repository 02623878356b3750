"""`alignez-gguf inspect`: what a control file holds; needs no model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alignez_gguf.control.control_file import ControlFile


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON object with everything, the tried edits too.")
def inspect(file: Path, as_json: bool) -> None:
    """Show what a control FILE holds, per layer.

    \b
    Example:
      alignez-gguf inspect safe.gguf
    """
    from alignez_gguf.control.control_file import ControlFile

    control = ControlFile.load(file)
    if as_json:
        click.echo(json.dumps(_described(control), ensure_ascii=False, indent=2))
    else:
        _print(control)


def _described(control: ControlFile) -> dict[str, Any]:
    return {
        "model": asdict(control.model),
        "sha256": control.sha256,
        "recipe": dict(control.recipe),
        "score": dict(control.score),
        "gate": None
        if control.gate is None
        else {"tokens": len(control.gate.tokens), "threshold": control.gate.threshold},
        "layers": [_layer(control, layer) for layer in range(_n_layer(control))],
    }


def _n_layer(control: ControlFile) -> int:
    return control.model.n_layer or max(control.edits) + 1


def _layer(control: ControlFile, layer: int) -> dict[str, Any]:
    edit = control.edits.get(layer)
    described: dict[str, Any] = {
        "layer": layer,
        "decision": edit.decision if edit else "none",
        "rank": edit.rank if edit else 0,
        "added_length": edit.scale if edit else 0.0,
    }
    report = control.layers
    if report is not None:
        described |= {name: float(values[layer]) for name, values in report.columns()}
    return described


def _print(control: ControlFile) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    model = control.model
    console.print(
        f"for {model}" + (_short(f": {model.name} {model.quantization}".rstrip()) if model.name else "")
    )
    for title, fields in (("recipe", control.recipe), ("score", control.score)):
        shown = [f"{key} {_short(value)}" for key, value in fields.items() if not isinstance(value, tuple)]
        if shown:
            console.print(f"{title}: {', '.join(shown)}")
    if control.gate is not None:
        console.print(
            f"gate: steers where the weighted log-probabilities of {len(control.gate.tokens)} tokens "
            f"behind the prompt exceed {control.gate.threshold:.3f}"
        )
    layers = [_layer(control, layer) for layer in range(_n_layer(control))]
    columns = list(layers[0])
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in layers:
        table.add_row(*(_short(row[column]) for column in columns))
    console.print(table)


def _short(value: object) -> str:
    """For a terminal, which the text of a stranger's file must not control."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "".join(character if character.isprintable() else "?" for character in str(value))
