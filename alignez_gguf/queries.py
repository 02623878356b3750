"""Where queries come from: text, CSV and JSONL files, standard input, and sets in the package."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from os import PathLike
from pathlib import Path

from alignez_gguf.errors import QueryError

_SHIPPED = {"default": "data/queries.txt", "demo": "demo/fit_queries.txt"}
_TEXT_COLUMNS = ("query", "prompt", "instruction", "goal", "question", "text")
"""Columns that are looked for, in this order, where none is named."""


def load_queries(source: str | PathLike[str], column: str | None = None) -> list[str]:
    """Read queries in their order, without blank ones and repetitions.

    Args:
        source: a .csv or .jsonl file, any other file (a query per line), `-` for standard input (a query per
            line), or the name of a set that ships with the package: `default` or `demo`.
        column: the column of a .csv file or field of a .jsonl file; by default the first there is of query,
            prompt, instruction, goal, question and text.

    Raises:
        QueryError: the file is missing, empty, not UTF-8 or not what its ending says, or has no such column.
    """
    name = str(source)
    text = read_text(name)
    read = {".csv": _from_csv, ".jsonl": _from_jsonl}.get(Path(name).suffix.lower())
    if read is None:
        if column is not None:
            raise QueryError(f"{name} has no columns; leave out --column, or give a .csv or .jsonl file")
        rows: Iterator[str] = iter(text.splitlines())
    else:
        rows = read(text, name, column)
    queries = list(dict.fromkeys(row.strip() for row in rows if row.strip()))
    if not queries:
        raise QueryError(f"{name} holds no queries; write at least one, or use the set named default")
    return queries


def read_text(name: str) -> str:
    """The UTF-8 text of a file, of standard input (`-`), or of a shipped set. Raises `QueryError`."""
    return _decoded(_read(name), "standard input" if name == "-" else name)


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        if name in _SHIPPED:
            return (files("alignez_gguf") / _SHIPPED[name]).read_bytes()
        return Path(name).read_bytes()
    except OSError as error:
        raise QueryError(
            f"cannot read the queries {name}: {error.strerror or error}; give a file, -, default or demo"
        ) from error


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise QueryError(f"{name} is not UTF-8 (line {line}); convert it to UTF-8") from error


def _from_csv(text: str, name: str, column: str | None) -> Iterator[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        chosen = _column(list(rows.fieldnames or []), name, column)
        for row in rows:
            yield row[chosen] or ""
    except csv.Error as error:
        raise QueryError(f"{name}, line {rows.line_num} is not CSV: {error}") from error


def _from_jsonl(text: str, name: str, column: str | None) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QueryError(f"{where} is not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise QueryError(f"{where} is not a JSON object; write one object per line")
        value = row[_column(list(row), where, column)]
        if not isinstance(value, str):
            raise QueryError(f"{where}: the query is not a string")
        yield value


def _column(names: list[str], where: str, column: str | None) -> str:
    for candidate in _TEXT_COLUMNS if column is None else (column,):
        if candidate in names:
            return candidate
    missing = f"no column {column!r}" if column else "no column with a usual name"
    raise QueryError(
        f"{where} has {missing}; name one of {', '.join(map(str, names)) or 'none'} with --column"
    )
