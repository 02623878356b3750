"""The queries of an evaluation with their labels, and whether the fit has seen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.errors import QueryError
from alignez_gguf.pairs.query_hash import QUERY_HASHES, query_hash
from alignez_gguf.prompts import datasets, tables
from alignez_gguf.prompts.queries import no_queries, read_queries

_LABEL = "harmful"


@dataclass(frozen=True)
class EvaluationQuery:
    """A query, and whether it is harmful; None where it has no label."""

    text: str
    harmful: bool | None = None


def load_evaluation_queries(source: str, column: str | None = None) -> list[EvaluationQuery]:
    """Read queries as `load_queries` does, each with the field `harmful` of its own row, where there is one.

    Raises:
        QueryError: as `load_queries`; or a label is neither true nor false, or two rows with the same query
            contradict each other.
    """
    if datasets.is_named(source) and column is None:
        rows = datasets.load_dataset_rows(source)
    else:
        labelled = ((record.where, text, _label(record)) for text, record in read_queries(source, column))
        rows = datasets.unanimous(
            (where, datasets.DatasetRow(text, label)) for where, text, label in labelled
        )
    if not rows:
        raise no_queries(source)
    return [EvaluationQuery(row.query, row.harmful) for row in rows]


def _label(record: tables.Record) -> bool | None:
    label = record.fields.get(_LABEL)
    if label is None or label == "":
        return None
    parsed = tables.truth(label)
    if parsed is None:
        raise QueryError(f"{record.where}: {_LABEL} is {label!r}; write true or false")
    return parsed


@dataclass(frozen=True)
class Overlap:
    """The queries of an evaluation that the fit has seen.

    Attributes:
        known: whether the control file says what it was fitted on.
        queries: the queries of the evaluation that were used in the fit too.
    """

    known: bool
    queries: tuple[str, ...]

    def __str__(self) -> str:
        if not self.known:
            return "unknown: the control file does not say which queries it was made from"
        if not self.queries:
            return "none: no query of this evaluation was used to make the control file"
        return (
            f"{len(self.queries)} queries of this evaluation were used to make the control file, "
            "which flatters the steered model; leave them out"
        )


def overlap(control: ControlFile, queries: Sequence[EvaluationQuery]) -> Overlap:
    """Compare the queries of an evaluation with those that a control file was made from."""
    hashes = control.recipe.get(QUERY_HASHES)
    if not isinstance(hashes, tuple):
        return Overlap(hashes is not None, ())
    seen = set(hashes)
    return Overlap(True, tuple(query.text for query in queries if query_hash(query.text) in seen))
