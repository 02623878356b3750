"""`alignez-gguf verify`: a control file held against its model, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignez_gguf.cli import options

if TYPE_CHECKING:
    from alignez_gguf.verification.verify import Verification


@click.command()
@options.model
@click.argument("files", metavar="FILE...", type=options.FILE, nargs=-1, required=True)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "patched", "stock"]),
    default="auto",
    show_default=True,
    help="Steer through the patch or through the adapters of stock llama.cpp; auto takes the patch if it is "
    "there.",
)
@click.option("--prompt", help="The prompt to decode; only its first 16 tokens are used.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the number of physical cores.")
@click.option("--gpu-layers", type=int, default=-1, show_default=True, help="Layers on the GPU; -1 is all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@options.quiet
@click.pass_context
def verify(
    context: click.Context,
    model: Path,
    files: tuple[Path, ...],
    runtime: str,
    prompt: str | None,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove that a control FILE acts on MODEL, here, as its numbers say.

    Every edited layer is edited alone, and what llama.cpp computes there is held against numpy. What it
    changes is held against what rounding alone changes on this machine, and so is what all layers change
    together. The patch is held against the stock form, and strength 0 must be the unsteered model, bit for
    bit. FILE is a control file, or its stock form, in one file or two. Exits 1 where anything does not hold.

    \b
    Examples:
      alignez-gguf verify model-Q4_K_M.gguf safe.gguf
      alignez-gguf verify model-Q4_K_M.gguf safe.lora.gguf safe.cvec.gguf
    """
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.exporters.stock_reader import is_lora, read
    from alignez_gguf.exporters.weights import ModelWeights
    from alignez_gguf.verification.verify import PROMPT
    from alignez_gguf.verification.verify import verify as run

    stock = len(files) > 1 or is_lora(files[0])
    if stock and runtime == "patched":
        raise click.UsageError("a LoRA and a control vector are the stock form; leave --runtime patched out.")
    found = run(
        model,
        read(files, ModelWeights(model)) if stock else ControlFile.load(files[0]),
        runtime="stock" if stock else runtime,  # type: ignore[arg-type]
        prompt=PROMPT if prompt is None else prompt,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        progress=reporter(quiet),
    )
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps(asdict(found), ensure_ascii=False))
    else:
        _print(found)
    if not found.ok:
        raise click.ClickException(
            f"the control does not act as it says on this {found.architecture} model: {found.reason}"
        )


def _print(found: Verification) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table("layer", "edit", "component before", "after", "to add", "added")
    for header in ("error", "stock error", "rounding", "acts", "reason"):
        table.add_column(header)
    for check in found.layers:
        table.add_row(
            str(check.layer),
            check.decision,
            *(
                _number(value)
                for value in (check.removed_before, check.removed_after, check.added_expected, check.added)
            ),
            _share(check.error, check.error_worst),
            _share(check.stock_error, check.stock_error_worst),
            _share(check.floor, check.floor_worst),
            "yes" if check.acts else "no",
            check.reason,
        )
    console.print(table)
    console.print(
        "error, stock error and rounding: shares of the edit, of the middle token (of the worst one)"
    )
    console.print(f"steered through: {found.runtime}")
    console.print(f"largest change of a logit: {found.logits_change:.3g}")
    console.print(
        f"change of the logits: {found.effect:.3g}, by rounding alone {found.rounding:.3g}, "
        f"a share of {_share(found.floor, found.floor_worst)}"
    )
    console.print(f"strength 0 bit-identical to no control: {'yes' if found.off_bit_identical else 'no'}")
    if found.patched_stock_max_diff is None:
        console.print(f"patched to stock: not compared ({found.patched_stock_note})")
    else:
        console.print(f"patched to stock, largest difference of a logit: {found.patched_stock_max_diff:.2g}")
        share = _share(found.patched_stock_share, found.patched_stock_share_worst)
        console.print(f"patched to stock, share of the change of the logits: {share}")
        holds = "yes" if found.stock_holds else f"no: {found.patched_stock_note}"
        console.print(f"the stock form holds: {holds}")
    console.print(f"unsteered: {found.text_unsteered!r}")
    console.print(f"steered:   {found.text_steered!r}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(median: float | None, worst: float | None) -> str:
    return "-" if median is None or worst is None else f"{median:.1e} ({worst:.1e})"
