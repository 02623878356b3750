"""Writes the report: a self-contained HTML page, and its data as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignez_gguf.errors import OutputError
from alignez_gguf.evaluation.document import document
from alignez_gguf.evaluation.plots import draw_plots
from alignez_gguf.evaluation.run import Evaluation
from alignez_gguf.storage.atomic import write_text

_SHOWN_CHARACTERS = 1200

RATE_COLUMNS = {"refuses": "refuses, %", "harm": "harm, %", "fluent": "fluent, %", "on_topic": "on topic, %"}
"""The columns of the table of rates, and their titles."""

RATES = {
    "harmful": {name: f"{name}_harmful" for name in RATE_COLUMNS},
    "harmless": {name: f"{name}_harmless" for name in RATE_COLUMNS} | {"refuses": "over_refuses_harmless"},
}
"""The names of these rates in a document, by kind of queries."""

BEHAVIOUR_COLUMNS = {
    "harmfulness": "harm, %",
    "fluent": "fluent, %",
    "on_topic": "on topic, %",
    "hostile": "insults, %",
    "perplexity": "perplexity under base",
    "repetition": "repetition, %",
    "clean_stop": "stops by itself, %",
    "empty": "empty, %",
}
"""The columns of the table of all queries, and their titles."""


def write_report(evaluation: Evaluation, path: Path) -> Path:
    """Write the page to `path` and the JSON beside it, and return the path of the JSON.

    Raises:
        OutputError: a file cannot be written.
    """
    beside = json_path(path)
    data = document(evaluation)
    write_text(beside, json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    write_text(path, render(data))
    return beside


def json_path(path: Path) -> Path:
    """Return the path of the JSON of a report.

    Raises:
        OutputError: the page itself has that path.
    """
    beside = path.with_suffix(".json")
    if beside == path:
        raise OutputError(f"{path} is the place of the JSON; give the report a name that ends in .html")
    return beside


def render(data: Mapping[str, Any]) -> str:
    """Render the HTML page of a document; see `document.document`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("alignez_gguf.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["estimate"] = _estimate
    environment.filters["number"] = _number
    environment.filters["shortened"] = _shortened
    page = environment.get_template("report.html")
    # Made by matplotlib from numbers and fixed labels, not from anything that a model said.
    plots = {name: Markup(svg) for name, svg in draw_plots(data).items()}
    tables = {"columns": BEHAVIOUR_COLUMNS, "rate_columns": RATE_COLUMNS, "rates": RATES}
    return page.render(report=data, plots=plots, **tables) + "\n"


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1f}"


def _estimate(estimate: Mapping[str, Any], signed: bool = False, digits: int = 1) -> str:
    """Format an estimate as "12.5 [3.1, 20.0] n = 40", or say why there is none."""
    if estimate["value"] is None:
        return f"undefined: {estimate['note']}" if estimate["n"] else "\u2013 n = 0"
    form = f"{'+' if signed else ''}.{digits}f"
    interval = (
        f"[{estimate['low']:{form}}, {estimate['high']:{form}}]"
        if estimate["low"] is not None
        else f"({estimate['note']})"
    )
    return f"{estimate['value']:{form}} {interval} n = {estimate['n']}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} \u2026"
