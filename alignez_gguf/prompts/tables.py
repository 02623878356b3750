"""Tables in files: CSV, JSON, JSONL, Parquet and plain text, each row with the place that an error can name.

Every file of queries, prompts, pairs or a data set is read here. This module does not know what a row means.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import threading
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from alignez_gguf.errors import QueryError, require_extra

LINE = "text"
"""The name of the only field of a line of plain text."""

TEXT_COLUMNS = ("query", "prompt", "instruction", "goal", "question", LINE)
"""Names of the column that is read where none is given, in this order."""


class Record(NamedTuple):
    """A row with its place, as an error names it.

    Attributes:
        where: the file and the line or row.
        fields: the values by the names of their columns.
        header: the file, where all its rows have the same fields; empty where each row has its own.
    """

    where: str
    fields: Mapping[str, object]
    header: str = ""


class Table(NamedTuple):
    """The rows of a file.

    Attributes:
        rows: an iterator, which raises `QueryError` at a row that cannot be read.
        has_columns: whether the fields have names; False for lines of text.
    """

    rows: Iterator[Record]
    has_columns: bool


def load_table(path: str | PathLike[str]) -> Table:
    """Read the rows of a file; see `parse`.

    Raises:
        QueryError: the file cannot be read, or what `parse` raises.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise QueryError(f"cannot read {path}: {error.strerror or error}") from error
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Table:
    """Parse the content of a file into rows, in the form that the ending of `name` says.

    The endings are .csv, .tsv, .json (a list of objects, or objects one after the other), .jsonl, .ndjson and
    .parquet, in any case and also with .gz or .txt behind them. Anything else is plain text, a row per line
    that is not blank, unless it is a list of JSON objects, JSON over several lines, or at least half of its
    lines are JSON objects: then it is read as that. So is a table whose first line names the usual columns:
    spreadsheets save TAB-delimited text as .txt.

    Raises:
        QueryError: the content is not of that form.
        MissingExtraError: pyarrow is needed and not installed.
    """
    data = _uncompressed(data, name)
    ending = _ending(name)
    if ending == _PARQUET or data.startswith(b"PAR1"):
        return Table(_from_parquet(data, name), has_columns=True)
    text = _decoded(data, name)
    if ending in _READERS:
        return Table(_READERS[ending](text, name), has_columns=True)
    if _is_json(text):
        mend = "it is read as JSON, since most of it is, so write one object per line"
        return Table(_from_json(text, name, mend), has_columns=True)
    if _has_header(text):
        return Table(_from_csv(text, name), has_columns=True)
    return Table(_from_lines(text, name), has_columns=False)


def lines(text: str) -> list[str]:
    """Split a text into lines, which end at \\n, \\r\\n or \\r. `str.splitlines` also cuts at U+2028."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it holds only spaces, control and zero-width characters."""
    return all(character.isspace() or unicodedata.category(character) in _INVISIBLE for character in text)


def truth(value: object) -> bool | None:
    """Read a field that is true, false, 1 or 0, as JSON or as a text; return None where it is neither.

    Tables in which a label is missing have 1.0 and 0.0: pandas makes such a column one of floats.
    """
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return known.get(str(value).strip().lower())


_INVISIBLE = ("Cc", "Cf", "Mn", "Me")
"""Unicode categories: control and format characters, and marks that need another character to be seen on."""


def _ending(name: str) -> str:
    path = Path(name.lower().removesuffix(".gz"))
    inner = Path(path.stem).suffix
    # Some programs put .txt behind the name of whatever they save.
    return inner if path.suffix == ".txt" and inner in (*_READERS, _PARQUET) else path.suffix


def _uncompressed(data: bytes, name: str) -> bytes:
    if not (name.lower().endswith(".gz") or data.startswith(b"\x1f\x8b")):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise QueryError(f"{name} is not a whole gzip file ({error}); fetch it again") from error


def _decoded(data: bytes, name: str) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark, which spreadsheets and PowerShell write."""
    if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise QueryError(f"{name} is a spreadsheet or an archive and no text; save it as .csv or .jsonl")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise QueryError(f"{name} is not whole UTF-16 ({error.reason}); save it as UTF-8") from error
    if (nul := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise QueryError(
            f"{name}, line {line} holds a NUL byte: it is UTF-16 without a mark, or no text; save it as UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise QueryError(f"{name} is not UTF-8 (line {line}); convert it to UTF-8") from error


def _from_lines(text: str, name: str) -> Iterator[Record]:
    for number, line in enumerate(lines(text), start=1):
        if not is_blank(line):
            yield Record(f"{name}, line {number}", {LINE: line})


_SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
"""The line with which spreadsheets say what separates the cells; it is not part of the table."""


class _Cells(NamedTuple):
    line: int
    """The line of the file on which the row begins."""
    cells: Sequence[str]


def _from_csv(text: str, name: str, usual: str = ",") -> Iterator[Record]:
    declared = _SEPARATOR_LINE.match(text)
    start, first_line = (declared.end(), 2) if declared else (0, 1)
    with _cells_of_any_length(len(text)):
        delimiter = declared[1] if declared else _delimiter(text, usual)
        try:
            rows = _rows_of_cells(text[start:], delimiter, first_line)
        except _NotCsvError as error:
            raise QueryError(f"{name}, line {error.line} is not CSV: {error}") from error
    if not rows:
        return
    header, *rows = rows
    titles = [title.strip() or f"column {number}" for number, title in enumerate(header.cells, start=1)]
    _check_columns(titles, f"{name}, line {header.line}")
    for line, cells in rows:
        if len(cells) != len(titles):
            mend = (
                f"put quotation marks around a text with {delimiter!r}"
                if len(cells) > len(titles)
                else "give each row all cells, if need be empty ones"
            )
            raise QueryError(
                f"{name}, line {line} has {len(cells)} cells, but the header has {len(titles)}; {mend}"
            )
    # Spreadsheets write columns in which nothing is.
    kept = [
        (index, title)
        for index, title in enumerate(titles)
        if not is_blank(header.cells[index]) or not all(is_blank(cells[index]) for _, cells in rows)
    ]
    for line, cells in rows:
        yield Record(f"{name}, line {line}", {title: cells[index] for index, title in kept}, name)


def _has_header(text: str) -> bool:
    """Whether the first line of a text names several columns and nothing else, a usual one among them."""
    first = next((line for line in lines(text) if not is_blank(line)), "")
    names = [name.strip().strip('"').lower() for name in re.split(r"[,;\t]", first)]
    return len(names) > 1 and all(map(str.isidentifier, names)) and not set(TEXT_COLUMNS).isdisjoint(names)


def _check_columns(titles: Sequence[str], where: str) -> None:
    if repeated := _repeated(titles):
        raise QueryError(f"{where}: the column {repeated!r} is there twice; rename one of them")


def _repeated(names: Sequence[str]) -> str | None:
    """Return the first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


class _NotCsvError(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _rows_of_cells(text: str, delimiter: str, first_line: int = 1) -> list[_Cells]:
    """Return all rows that are not empty.

    Raises:
        _NotCsvError: the text is not CSV.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], first_line
    try:
        for cells in reader:
            if not all(map(is_blank, cells)):
                rows.append(_Cells(line, cells))
            line = first_line + reader.line_num
    except csv.Error as error:
        raise _NotCsvError(line, str(error)) from error
    return rows


def _delimiter(text: str, usual: str) -> str:
    """Find what separates the cells of the header; among several, the one on which the rows agree."""
    header = next((line for line in io.StringIO(text, newline="") if not is_blank(line)), "")
    n_cells = {
        delimiter: len(next(csv.reader([header], delimiter=delimiter), []))
        for delimiter in (usual, ",", ";", "\t")
    }
    possible = [delimiter for delimiter, count in n_cells.items() if count > 1]
    if len(possible) > 1:
        fitting = [delimiter for delimiter in possible if _rows_agree(text, delimiter)]
        return max(fitting or possible, key=n_cells.__getitem__)
    return possible[0] if possible else usual


def _rows_agree(text: str, delimiter: str) -> bool:
    """Whether all rows have as many cells."""
    try:
        return len({len(cells) for _, cells in _rows_of_cells(text, delimiter)}) == 1
    except _NotCsvError:
        return False


_CELL_LIMIT = threading.Lock()


@contextmanager
def _cells_of_any_length(longest: int) -> Iterator[None]:
    """Let the csv module read cells of up to `longest` characters instead of 128 KiB."""
    with _CELL_LIMIT:  # the limit is one for the whole process, which gets it back
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, min(longest, 2**31 - 1)))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _is_json(text: str) -> bool:
    """Whether a text is to be read as JSON.

    It is where it is one object or a list of objects, where it is JSON whose values go over several lines,
    and where at least half of its lines are objects.
    """
    values = _values(text)
    if _go_over_lines(values) or (len(values) == 1 and _holds_objects(values[0].value)):
        return True
    filled = [line for line in lines(text) if not is_blank(line)]
    n_objects = sum(line.lstrip()[:1] == "{" and isinstance(_loaded_or_none(line), dict) for line in filled)
    return n_objects > 0 and 2 * n_objects >= len(filled)


class _Value(NamedTuple):
    line: int
    """The line of the file on which it begins."""
    source: str
    value: object


def _values(text: str) -> list[_Value]:
    """Return the objects and lists of a text; none where it holds anything else."""
    text = "\n".join(lines(text))
    values, position, line = [], 0, 1
    try:
        while start := _NO_SPACE.search(text, position):
            line += text.count("\n", position, start.start())
            value, position = json.JSONDecoder().raw_decode(text, start.start())
            if not isinstance(value, (dict, list)):
                return []
            values.append(_Value(line, text[start.start() : position], value))
            line += text.count("\n", start.start(), position)
    except (ValueError, RecursionError):
        return []
    return values


_NO_SPACE = re.compile(r"[^ \t\n\r]")


def _go_over_lines(values: Sequence[_Value]) -> bool:
    return any("\n" in value.source for value in values)


def _holds_objects(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def _loaded_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_json(text: str, name: str, mend: str = "write one object per line") -> Iterator[Record]:
    # The red-team attempts of hh-rlhf are published as one list in a file that ends in .jsonl.
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        rows = _loads(text, name, "give a list of objects, or one object per line")
        for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):
            yield _object(row, f"{name}, row {number}")
        return
    # jq and editors write an object over several lines.
    if _go_over_lines(values := _values(text)):
        numbered = [(value.line, value.source) for value in values]
    else:
        numbered = list(enumerate(lines(text), start=1))
    for number, source in numbered:
        if not is_blank(source):
            where = f"{name}, line {number}"
            yield _object(_loads(source, where, mend), where)


def _from_parquet(data: bytes, name: str) -> Iterator[Record]:
    with require_extra("datasets", f"reading {name}", "give a .csv or .jsonl"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise QueryError(f"cannot read {name}: {reason}; is it a whole .parquet file?") from error
    _check_columns(table.column_names, name)
    for number, row in enumerate(table.to_pylist(), start=1):
        yield Record(f"{name}, row {number}", row, name)


def _loads(text: str, where: str, mend: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=partial(_without_repetition, where))
    except (ValueError, RecursionError) as error:
        raise QueryError(f"{where} is not JSON ({error}); {mend}") from error


def _without_repetition(where: str, pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = _repeated([name for name, _ in pairs])
        raise QueryError(f"{where} has the field {repeated!r} twice; rename one of them")
    return fields


def _object(row: object, where: str) -> Record:
    if not isinstance(row, dict):
        raise QueryError(f"{where} is not a JSON object; write one object per line")
    return Record(where, row)


_READERS: Mapping[str, Callable[[str, str], Iterator[Record]]] = {
    ".csv": _from_csv,
    ".tsv": partial(_from_csv, usual="\t"),
    ".json": _from_json,
    ".jsonl": _from_json,
    ".ndjson": _from_json,
}
_PARQUET = ".parquet"

ENDINGS = tuple(ending + zipped for ending in (*_READERS, _PARQUET, ".txt") for zipped in ("", ".gz"))
"""The endings that decide how a file is read, in lower case."""
