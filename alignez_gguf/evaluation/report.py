"""The report: one HTML page that needs nothing beside it, and the same as JSON."""

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
    """Write the page to `path` and the JSON beside it, whose path is returned.

    Raises:
        OutputError: a file cannot be written.
    """
    beside = json_path(path)
    found = document(evaluation)
    write_text(beside, json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    write_text(path, render(found))
    return beside


def json_path(path: Path) -> Path:
    """Where the JSON goes. Raises `OutputError` where it would take the place of the page."""
    beside = path.with_suffix(".json")
    if beside == path:
        raise OutputError(f"{path} is the place of the JSON; give the report a name that ends in .html")
    return beside


def render(found: Mapping[str, Any]) -> str:
    """The page of a document."""
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
    plots = {name: Markup(svg) for name, svg in draw_plots(found).items()}
    tables = {"columns": BEHAVIOUR_COLUMNS, "rate_columns": RATE_COLUMNS, "rates": RATES}
    return page.render(report=found, plots=plots, **tables) + "\n"


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1f}"


def _estimate(estimate: Mapping[str, Any], signed: bool = False, digits: int = 1) -> str:
    """ "12.5 [3.1, 20.0] n = 40", or why there is none."""
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
