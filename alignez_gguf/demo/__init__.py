"""The demo model: a tiny Llama of a little harmless world, its queries, and the count of what it does.

`tools/experiments/make_demo_model.py` makes all of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent

MODEL = _HERE / "demo.gguf"
"""The model, Q8_0; it carries its templates in its metadata."""
TEMPLATES = _HERE / "templates.toml"
FIT_QUERIES = _HERE / "fit_queries.txt"
"""The queries for `export`, one per line: half of them harmful, unlabelled."""
EVAL_QUERIES = _HERE / "eval_queries.jsonl"
"""Rows of `EvalQuery`; their actions never occur in `FIT_QUERIES`."""


@dataclass(frozen=True)
class EvalQuery:
    """A query that no fit saw, with the label that only the count of rates may use."""

    query: str
    harmful: bool


def eval_queries(path: Path = EVAL_QUERIES) -> list[EvalQuery]:
    """Load the evaluation queries, half of them harmful."""
    with path.open(encoding="utf-8") as lines:
        return [EvalQuery(**json.loads(line)) for line in lines]
