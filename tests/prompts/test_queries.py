from __future__ import annotations

import gzip
import io
import sys

import pytest

from alignez_gguf.errors import QueryError
from alignez_gguf.prompts.queries import load_queries


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
        return path

    return write


def test_text_file_gives_a_query_per_line_without_blanks_and_repetitions(write):
    assert load_queries(write("q.txt", "\ufeffone\r\n\n  two \none\nthree")) == ["one", "two", "three"]


def test_csv_column_is_found_or_named(write):
    path = write("q.csv", 'id,Goal,prompt\n1,x,"how,\nto"\n2,y,why\n3,z,\n')
    assert load_queries(path) == ["how,\nto", "why"]
    assert load_queries(path, column="Goal") == ["x", "y", "z"]


def test_jsonl_field_is_found_or_named(write):
    path = write("q.jsonl", '{"text": "a", "query": "b"}\n\n{"query": "c", "text": "d"}\n')
    assert load_queries(path) == ["b", "c"]
    assert load_queries(path, column="text") == ["a", "d"]


def test_json_list_and_compressed_files_are_read(write):
    rows = '[{"query": "a"}, {"query": "b"}]'
    assert load_queries(write("q.json", rows)) == ["a", "b"]
    assert load_queries(write("q.json.gz", gzip.compress(rows.encode()))) == ["a", "b"]
    assert load_queries(write("q.txt.gz", gzip.compress(b"one\ntwo"))) == ["one", "two"]


def test_standard_input_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("wie größer\nwhy\n".encode())))
    assert load_queries("-") == ["wie größer", "why"]


def test_default_set_ships_with_the_package_in_twins():
    queries = load_queries("default")
    assert len(queries) == 120
    assert max(map(len, queries)) < 80
    for harmful, harmless in zip(queries[::2], queries[1::2], strict=True):
        shared = set(harmful.lower().split()) & set(harmless.lower().split())
        assert len(shared) >= 2, (harmful, harmless)


@pytest.mark.parametrize(
    ("name", "data", "column", "message"),
    [
        ("q.txt", "", None, "holds no queries"),
        ("q.txt", " \n\n", None, "holds no queries"),
        ("q.txt", b"good\nna\xefve\n", None, r"not UTF-8 \(line 2\)"),
        ("q.txt", "one", "query", "has no columns"),
        ("q.csv", "a,b\n1,2\n", None, "name one of a, b with --column"),
        ("q.csv", "a,b\n1,2\n", "c", "no column 'c'.*a, b"),
        ("q.csv", "query\n", None, "holds no queries"),
        ("q.csv", "", None, "holds no queries"),
        ("q.csv", 'query\n"open', None, "is not CSV: unexpected end"),
        ("q.jsonl", '{"query": "a"}\n{"query"', None, "line 2 is not JSON"),
        ("q.jsonl", "[]", None, "holds no queries"),
        ("q.jsonl", "3", None, "line 1 is not a JSON object"),
        ("q.jsonl", '["a"]', None, "row 1 is not a JSON object"),
        ("q.jsonl.gz", '{"query": "a"}', None, "not a whole gzip file"),
        ("q.jsonl", '{"query": 3}', None, "line 1: the query is not a string"),
        ("q.jsonl", '{"query": "a"}\n{"other": "b"}', None, "line 2 has no column"),
    ],
)
def test_unusable_files_are_refused_with_the_mend(write, name, data, column, message):
    with pytest.raises(QueryError, match=message) as refusal:
        load_queries(write(name, data), column)
    assert "\n" not in str(refusal.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(QueryError, match=r"No such file.*a data set.*xstest"):
        load_queries(tmp_path / "none.txt")
    with pytest.raises(QueryError, match="cannot read"):
        load_queries(tmp_path)
