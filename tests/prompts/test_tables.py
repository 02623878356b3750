"""Tables as people have them: every known ending, spreadsheets, long cells, and lines that are none."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignez_gguf.errors import QueryError
from alignez_gguf.prompts import tables
from alignez_gguf.prompts.datasets import load_dataset_rows
from alignez_gguf.prompts.queries import load_queries

QUERIES = ["How can I flood a tunnel?", "Bake, then paint; a cake?", 'Say "no"\nto a goose?']
ROWS = [{"prompt": query, "harmful": str(number)} for number, query in enumerate(QUERIES)]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, data: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
        return path

    return write


def delimited(delimiter: str) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
FORMS = {
    ".csv": delimited(",").encode(),
    ".tsv": delimited("\t").encode(),
    ".jsonl": JSONL.encode(),
    ".ndjson": JSONL.encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
}


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("ending", [*FORMS, ".parquet"])
def test_every_ending_is_read_in_any_case_and_compressed(write: Write, ending: str, zipped: str) -> None:
    data = parquet_bytes(ROWS) if ending == ".parquet" else FORMS[ending]
    for name in (f"q{ending}{zipped}", f"Q{ending.upper()}{zipped.upper()}"):
        path = write(name, gzip.compress(data) if zipped else data)
        assert load_queries(path) == QUERIES
        assert load_queries(path, column="harmful") == ["0", "1", "2"]
        assert [row.query for row in load_dataset_rows(f"advbench={path}")] == QUERIES


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("q.jsonl.txt", ".jsonl"),
        ("q.csv.txt", ".csv"),
        ("q", ".jsonl"),
        ("q.txt", ".json"),
        ("q.log", ".jsonl"),
    ],
)
def test_text_that_is_a_table_is_not_taken_as_lines(write: Write, name: str, form: str) -> None:
    assert load_queries(write(name, FORMS[form])) == QUERIES
    assert load_queries(write(f"{name}.gz", gzip.compress(FORMS[form]))) == QUERIES


@pytest.mark.parametrize("data", [JSONL.encode(), gzip.compress(JSONL.encode()), FORMS[".json"]])
def test_standard_input_may_be_json(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert load_queries("-") == QUERIES


def test_jsonl_on_standard_input_that_was_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(JSONL.encode()[:-5])))
    with pytest.raises(QueryError, match="standard input, line 3 is not JSON"):
        load_queries("-")


def test_some_json_in_a_text_leaves_it_a_text(write: Write) -> None:
    lines = ["Explain this:", '{"a": 1}', "[1, 2]", "{not json}"]
    assert load_queries(write("q.txt", "\n".join(lines))) == lines
    assert load_queries(write("q.txt", '["a", "list"]')) == ['["a", "list"]']


@pytest.mark.parametrize("name", ["q.txt", "q", "q.json", "q.jsonl"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_objects_over_several_lines_are_read_as_such(write: Write, name: str, line_end: str) -> None:
    objects = [json.dumps(row, indent=2).replace("\n", line_end) for row in ROWS]  # as `jq .` writes them
    assert load_queries(write(name, line_end.join(objects) + line_end)) == QUERIES
    assert load_queries(write(name, objects[0])) == QUERIES[:1]
    second = json.dumps({"prompt": 5}, indent=2).replace("\n", line_end)
    with pytest.raises(QueryError, match=f"{name}, line 6: the query is not a string"):
        load_queries(write(name, f"{line_end}{objects[0]}{line_end}{second}"))


def test_a_list_over_several_lines_is_not_taken_as_lines(write: Write) -> None:
    with pytest.raises(QueryError, match=r"q.txt, row 1 is not a JSON object"):
        load_queries(write("q.txt", json.dumps(QUERIES, indent=1)))


@pytest.mark.parametrize("ending", [".txt", ""])
def test_lines_end_at_line_feeds_and_carriage_returns_only(write: Write, ending: str) -> None:
    kept = [f"How can I{char}fly?" for char in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    assert load_queries(write(f"q{ending}", "\n".join(kept))) == kept
    assert load_queries(write(f"q{ending}", "a\rb\r\nc\n\rd")) == ["a", "b", "c", "d"]
    rows = [f'{{"query": "{query}"}}' for query in kept[:3]]  # JSON has the others escaped
    assert load_queries(write("q.jsonl", "\r".join(rows))) == kept[:3]


INVISIBLE = ["\u200b", "\u200c\u200d", "\u2060", "\ufeff\ufeff", "\u200e \u00ad", "\u180e", "\ufe0f", "\x1a"]


@pytest.mark.parametrize("separator", ["\t", ";", ","])
@pytest.mark.parametrize("name", ["excel.txt", "standard input"])
def test_text_that_begins_with_the_names_of_columns_is_a_table(separator: str, name: str) -> None:
    text = f"harmful{separator}prompt\r\n1{separator}How can I flood a tunnel?\r\n"
    table = tables.parse(text.encode(), name)
    assert table.has_columns
    assert [record.fields for record in table.rows] == [
        {"harmful": "1", "prompt": "How can I flood a tunnel?"}
    ]


@pytest.mark.parametrize(
    "text", ["prompt\nHow?\n", "How, text?\nWhy\n", "make\ta plan\nwork\tslowly\n", "text: a, b\nc\n"]
)
def test_text_that_does_not_begin_with_the_names_of_columns_stays_lines(text: str) -> None:
    assert not tables.parse(text.encode(), "queries.txt").has_columns


def test_texts_without_anything_visible_are_empty(write: Write) -> None:
    texts = [*INVISIBLE, "a", "\u200b b\u200b"]
    expected = ["a", "\u200b b\u200b"]
    assert load_queries(write("q.txt", "\n".join(texts))) == expected
    assert load_queries(write("q.csv", "prompt,id\n" + "".join(f"{text},1\n" for text in texts))) == expected
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    assert load_queries(write("q.jsonl", rows)) == expected
    assert [row.query for row in load_dataset_rows(f"advbench={write('a.jsonl', rows)}")] == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [";", "\t", ","])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_spreadsheets_are_read_whatever_separates_their_cells(
    write: Write, ending: str, delimiter: str, encoding: str
) -> None:
    text = delimited(delimiter).encode(encoding)
    assert load_queries(write(f"q{ending}", text)) == QUERIES
    named = f"sep={delimiter}\r\n{delimited(delimiter)}".encode(encoding)
    assert load_queries(write(f"q{ending}", named)) == QUERIES


def test_header_that_could_mean_two_separators_is_decided_by_the_rows(write: Write) -> None:
    assert load_queries(write("q.csv", "id,prompt,seen (a; b; c)\n1,x; y,z\n")) == ["x; y"]
    assert load_queries(write("q.csv", "id;prompt;seen (a, b)\n1;x, y;z\n")) == ["x, y"]
    assert load_queries(write("q.tsv", "prompt\nx, y; z\n")) == ["x, y; z"]


def test_unnamed_columns_of_a_spreadsheet_are_kept_where_they_hold_something(write: Write) -> None:
    path = write("q.csv", ";prompt;;\n0;a;;\n1;b;;\n;;;\n")
    assert load_queries(path) == ["a", "b"]
    assert load_queries(path, column="column 1") == ["0", "1"]
    with pytest.raises(QueryError, match="name one of column 1, prompt with --column"):
        load_queries(path, column="column 3")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("prompt\na\n\nHow, then?\n", "line 4 has 2 cells, but the header has 1"),
        ("prompt\nHow,\n", "line 2 has 2 cells, but the header has 1"),
        ("id,prompt\n1,a\n2\n", "line 3 has 1 cells, but the header has 2"),
        ('\r\nid,prompt\r\n1,"a\r\n\r\nb"\r\n\r\n2,c,d\r\n', "line 7 has 3 cells"),
        ('sep=;\nid;prompt\n1;"a\nb"\n2;b;c\n', "line 5 has 3 cells"),
        ("prompt,harmful,prompt\na,1,b\n", "line 1: the column 'prompt' is there twice"),
        ("\n\nprompt, prompt\na,b\n", "line 3: the column 'prompt' is there twice"),
        ('prompt\na\n"b\nc\nd', "line 3 is not CSV"),
        ('prompt\na\n"b" c\n', "line 3 is not CSV"),
    ],
)
@pytest.mark.parametrize("read", ["load_queries", "load_dataset_rows"])
def test_rows_that_do_not_fit_the_header_are_refused_by_their_line(
    write: Write, data: str, message: str, read: str
) -> None:
    path = write("q.csv", data)
    with pytest.raises(QueryError, match=message) as refusal:
        load_queries(path) if read == "load_queries" else load_dataset_rows(f"xstest={path}")
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_field_that_is_there_twice_is_refused(write: Write) -> None:
    with pytest.raises(QueryError, match="line 2 has the field 'prompt' twice"):
        load_queries(write("q.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n'))


def test_cells_are_read_whatever_their_length_and_the_limit_of_others_stays(write: Write) -> None:
    long = "How can I bake? " * 100_000
    limit = csv.field_size_limit()
    path = write("q.csv", f'id,prompt\n1,"{long}"\n2,{long}b\n')
    assert load_queries(path) == [long.strip(), f"{long}b"]
    assert csv.field_size_limit() == limit

    wrong: list[object] = []

    def read() -> None:
        try:
            wrong.extend([] if load_queries(path) == [long.strip(), f"{long}b"] else ["other queries"])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("q.csv", "prompt\nä\n".encode("utf-16-le"), r"q.csv, line 1 holds a NUL byte"),
        ("q.txt", b"a\nb\0c\n", r"q.txt, line 2 holds a NUL byte"),
        ("q.csv", "prompt\n".encode("utf-16") + b"\0", r"q.csv is not whole UTF-16"),
        ("q.xlsx", b"PK\x03\x04\x14\x00", r"q.xlsx is a spreadsheet or an archive.*\.csv"),
        ("q.csv", b"PK\x03\x04\x14\x00", r"q.csv is a spreadsheet or an archive"),
        ("q.parquet", b"PAR1 nonsense", "cannot read .*q.parquet"),
        ("q.parquet.gz", b"PAR1", "not a whole gzip file"),
    ],
)
def test_files_of_other_kinds_are_refused_with_the_mend(
    write: Write, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(QueryError, match=message) as refusal:
        load_queries(write(name, data))
    assert "\n" not in str(refusal.value)


FAULTS = Path(__file__).parents[3] / "shared" / "faults"


@pytest.mark.parametrize("name", ["q.JSONL", "q.ndjson", "q_list.json", "excel_semicolon.csv"])
def test_files_that_people_really_have(name: str) -> None:
    if not FAULTS.is_dir():
        pytest.skip(f"no such files in {FAULTS}")
    assert load_queries(FAULTS / name) == [
        "How can I flood a tunnel?",
        "How can I write a song?",
        "Show me how to fly a kite.",
        "What is the best way to spread a rumor?",
    ]
