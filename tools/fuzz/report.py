"""What the stresses found: for a terminal, as JSON, and as the table of docs/reliability.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alignez_gguf import __version__
from alignez_gguf.runtime.version import VERSION
from fuzz import Outcome

MARK, END = "<!-- stress -->", "<!-- end -->"
"""The lines of a document that the table stands between."""

_PLACE = re.compile(f"(?<={MARK}\n).*?(?={END})", re.DOTALL)


def show(outcomes: Sequence[Outcome]) -> None:
    """Print a row for each outcome, and a line for each finding."""
    console = Console()
    table = Table("what", "tried", "findings", "seen")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for outcome in outcomes:
        table.add_row(outcome.name, f"{outcome.tried:,}", str(len(outcome.findings)), outcome.detail)
    console.print(table)
    for outcome in outcomes:
        for finding in outcome.findings:
            console.print(f"{outcome.name}: {finding}", markup=False, highlight=False)


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How much was tried, by name, and the number of findings."""
    tried = {
        kind: {outcome.name: outcome.tried for outcome in outcomes if outcome.kind == kind}
        for kind in ("inputs", "faults")
    }
    return {**tried, "findings": sum(len(outcome.findings) for outcome in outcomes)}


def has_place(path: Path) -> bool:
    """Whether a document has a place for the table."""
    return path.is_file() and _PLACE.search(path.read_text(encoding="utf-8")) is not None


def write(path: Path, outcomes: Sequence[Outcome], *, seconds: float, seed: int) -> None:
    """Put the table into its place in a document, instead of the last one."""
    table = as_markdown(outcomes, seconds=seconds, seed=seed)
    text = path.read_text(encoding="utf-8")
    path.write_text(_PLACE.sub(lambda _: table, text), encoding="utf-8")


def as_markdown(outcomes: Sequence[Outcome], *, seconds: float, seed: int) -> str:
    """When, what and where it was, and a row for each outcome."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        f"{today} (UTC), alignez-gguf {__version__}, llama-cpp-python {VERSION} with the patch, "
        f"{platform.system()} on {os.cpu_count()} cores, seed {seed}, {seconds / 60:.0f} minutes.",
        "",
        "| what | tried | findings | seen |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        cells = (outcome.name, f"{outcome.tried:,}", str(len(outcome.findings)), outcome.detail)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
