"""Loads queries from files, standard input, sets in the package, and published data sets by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.resources import files
from os import PathLike
from pathlib import Path

from alignez_gguf.errors import QueryError
from alignez_gguf.prompts import datasets, tables

_SHIPPED = {"default": "data/queries.txt", "demo": "demo/fit_queries.txt"}


def load_queries(source: str | PathLike[str], column: str | None = None) -> list[str]:
    """Read queries in their order, without blank ones and repetitions.

    Args:
        source: a file in one of the forms that `tables.parse` knows, `-` for standard input (a query per
            line, or JSONL), the name of a set that ships with the package (`default` or `demo`), or a
            published data set: one of `datasets.NAMES`, from the Hugging Face Hub, or `NAME=PATH`, from a
            local file or directory. A file whose name is that of a set is given as `./NAME`.
        column: the column or field that holds the query; by default the first that exists of query, prompt,
            instruction, goal, question and text.

    Raises:
        QueryError: the file is missing, empty, not UTF-8 or not what its ending says, or has no such column;
            or the data set is out of reach.
    """
    name = str(source)
    queries = list(dict.fromkeys(query for query, _ in read_queries(name, column)))
    if not queries:
        raise no_queries(name)
    return queries


def no_queries(name: str) -> QueryError:
    """Return the error that a source of queries is empty."""
    return QueryError(f"{name} holds no queries; write at least one, or use the set named default")


def read_queries(name: str, column: str | None = None) -> Iterator[tuple[str, tables.Record]]:
    """Yield each query with its row, in their order, without blank ones.

    Raises:
        QueryError: as `load_queries`, but for a file without queries.
    """
    if datasets.is_named(name):
        if column is not None:
            raise QueryError(f"the column of {name} is known; leave out --column")
        for row in datasets.load_dataset_rows(name):
            yield row.query, tables.Record(name, {})
        return
    table = read_table(name)
    if column is not None and not table.has_columns:
        raise QueryError(f"{name} has no columns; leave out --column, or give a .csv or .jsonl file")
    for record in table.rows:
        text = _text(record, column)
        if not tables.is_blank(text):
            yield text.strip(), record


def read_table(name: str) -> tables.Table:
    """Read the rows of a file, of standard input (`-`), or of a shipped set.

    Raises:
        QueryError: it cannot be read.
    """
    return tables.parse(_read(name), "standard input" if name == "-" else name)


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        if name in _SHIPPED:
            return (files("alignez_gguf") / _SHIPPED[name]).read_bytes()
        return Path(name).read_bytes()
    except OSError as error:
        raise QueryError(
            f"cannot read {name}: {error.strerror or error}; give a file, -, default, demo or a data set "
            f"({', '.join(datasets.NAMES)})"
        ) from error


def _text(record: tables.Record, column: str | None) -> str:
    value = record.fields[_column(record, column)]
    if not isinstance(value, str):
        raise QueryError(
            f"{record.where}: the query is not a string; name the column with texts with --column"
        )
    return value


def _column(record: tables.Record, column: str | None) -> str:
    for candidate in tables.TEXT_COLUMNS if column is None else (column,):
        if candidate in record.fields:
            return candidate
    missing = f"no column {column!r}" if column else "no column with a usual name"
    names = ", ".join(filter(None, record.fields)) or "none"
    raise QueryError(f"{record.header or record.where} has {missing}; name one of {names} with --column")
