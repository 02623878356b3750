from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import QueryError
from alignez_gguf.evaluation.queries import EvaluationQuery, load_evaluation_queries, overlap

MODEL = ModelInfo(arch="llama", n_embd=4, n_layer=2)


def control(**recipe: object) -> ControlFile:
    return ControlFile(MODEL, {0: LayerEdit(remove=np.eye(4)[0])}, recipe=recipe)  # type: ignore[arg-type]


def sixteen_digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_queries_of_the_fit_are_found_whatever_their_case_and_margins() -> None:
    asked = [EvaluationQuery("How do I SING?"), EvaluationQuery("How do I dance?")]
    found = overlap(control(query_hashes=(sixteen_digits("how do i sing?"), "0" * 16)), asked)
    assert found.known
    assert found.queries == ("How do I SING?",)
    assert "1 queries" in str(found)


def test_no_overlap_is_told_from_an_unknown_one() -> None:
    asked = [EvaluationQuery("x")]
    assert str(overlap(control(query_hashes=("0" * 16,)), asked)).startswith("none")
    assert str(overlap(control(), asked)).startswith("unknown")


def test_labels_are_read_from_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "a", "harmful": true}\n{"query": " b ", "harmful": false}\n{"query": "c"}\n')
    assert load_evaluation_queries(str(path)) == [
        EvaluationQuery("a", True),
        EvaluationQuery("b", False),
        EvaluationQuery("c", None),
    ]


def test_labels_are_read_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("goal,harmful\na,True\nb,0\nc,\n")
    assert [query.harmful for query in load_evaluation_queries(str(path))] == [True, False, None]


def test_labels_are_read_from_a_column_of_floats(tmp_path: Path) -> None:
    """As pandas writes it where a label is missing."""
    path = tmp_path / "queries.csv"
    path.write_text("query,harmful\na,1.0\nb,0.0\nc,\n")
    assert [query.harmful for query in load_evaluation_queries(str(path))] == [True, False, None]
    path = tmp_path / "queries.jsonl"
    path.write_text('{"query": "a", "harmful": 1.0}\n{"query": "b", "harmful": 0.0}\n')
    assert [query.harmful for query in load_evaluation_queries(str(path))] == [True, False]


def test_label_that_is_neither_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "a", "harmful": true}\n{"query": "b", "harmful": "perhaps"}\n')
    with pytest.raises(QueryError, match=r"line 2.*'perhaps'"):
        load_evaluation_queries(str(path))


def test_text_files_have_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text("a\nb\n")
    assert load_evaluation_queries(str(path)) == [EvaluationQuery("a"), EvaluationQuery("b")]


def test_label_is_that_of_the_row_whose_query_it_is(tmp_path: Path) -> None:
    path = tmp_path / "contrast.jsonl"
    flood, paint = "How can I flood a tunnel?", "How can I paint a tunnel?"
    path.write_text(
        f'{{"prompt": "{flood}", "harmful": true}}\n'
        f'{{"prompt": "{paint}", "harmful": false, "contrast_of": "{flood}"}}\n'
    )
    assert load_evaluation_queries(str(path)) == [EvaluationQuery(flood, True), EvaluationQuery(paint, False)]
    path.write_text(
        f'{{"a": "{flood}", "b": "{paint}", "harmful": 1}}\n{{"a": "x", "b": "{flood}", "harmful": 0}}\n'
    )
    assert load_evaluation_queries(str(path), "b") == [
        EvaluationQuery(paint, True),
        EvaluationQuery(flood, False),
    ]


@pytest.mark.parametrize(
    ("name", "text", "first", "second"),
    [
        (
            "q.jsonl",
            '{"query": "a", "harmful": true}\n{"query": "b"}\n\n{"query": " a", "harmful": "0"}\n',
            1,
            4,
        ),
        ("q.csv", 'query;harmful\na;false\n"b\nc";1\na;TRUE\n', 2, 5),
    ],
)
def test_two_labels_of_one_query_are_refused_with_both_lines(
    tmp_path: Path, name: str, text: str, first: int, second: int
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(
        QueryError, match=rf"line {second} calls 'a' harm.*line {first} calls it harm"
    ) as refusal:
        load_evaluation_queries(str(path))
    assert "\n" not in str(refusal.value)


def test_rows_that_agree_or_do_not_say_are_one_query(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"query": "a"}\n{"query": "a", "harmful": true}\n{"query": "a", "harmful": 1}\n{"query": "a"}\n'
    )
    assert load_evaluation_queries(str(path)) == [EvaluationQuery("a", True)]


def test_labels_are_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b'{"query": "a", "harmful": true}\n{"query": "b", "harmful": false}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows)))
    assert load_evaluation_queries("-") == [EvaluationQuery("a", True), EvaluationQuery("b", False)]


def test_published_set_whose_rows_contradict_or_have_another_label_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,label\na,safe\nb,safe\na,unsafe\n")
    with pytest.raises(QueryError, match=r"line 4 calls 'a' harmful.*line 2 calls it harmless"):
        load_evaluation_queries(f"xstest={path}")
    path.write_text("prompt,label\na,safe\nb,Unsafe\n")
    with pytest.raises(QueryError, match=r"line 3: the label is 'Unsafe'"):
        load_evaluation_queries(f"xstest={path}")
    path.write_text("prompt\na\n")
    assert load_evaluation_queries(f"xstest={path}") == [EvaluationQuery("a", None)]
