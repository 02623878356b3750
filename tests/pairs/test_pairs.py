from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import permutations

import pytest

from alignez_gguf.errors import QueryError, WorkDirectoryError
from alignez_gguf.pairs.pairs import PairStore, PreferencePair, load_pairs

FIRST = PreferencePair("How do I bake?", "With care,\nslowly.", "Don't.", "be kind", "be rude")
SECOND = PreferencePair("Grüße?", "Schöne Grüße 🙂", "No\u2028greeting", truncated=True, sample=3, weight=2.5)


def test_pairs_come_back_as_they_were_stored(tmp_path):
    with PairStore(tmp_path / "pairs.jsonl") as store:
        store.append(FIRST)
        store.append(SECOND)
    assert load_pairs(tmp_path / "pairs.jsonl") == [FIRST, SECOND]
    assert len((tmp_path / "pairs.jsonl").read_bytes().splitlines()) == 2


def test_pair_is_on_the_disk_when_append_returns(tmp_path):
    store = PairStore(tmp_path / "pairs.jsonl")
    store.append(FIRST)
    assert load_pairs(tmp_path / "pairs.jsonl") == [FIRST]
    store.close()


@pytest.mark.parametrize("lost", [1, 2, 20])
def test_half_written_line_is_dropped_and_written_again(tmp_path, lost):
    path = tmp_path / "pairs.jsonl"
    with PairStore(path) as store:
        store.append(FIRST)
        store.append(SECOND)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])

    with PairStore(path) as store:
        assert list(store) == [FIRST]
        store.append(SECOND)
        assert len(store) == 2

    assert path.read_bytes() == whole


def test_text_that_is_not_unicode_is_stored_with_replacements(tmp_path):
    with PairStore(tmp_path / "pairs.jsonl") as store:
        store.append(PreferencePair("q", "a\udcff", "b"))
    assert load_pairs(tmp_path / "pairs.jsonl")[0].helpful == "a?"


def test_rows_of_preference_data_sets_are_read(tmp_path):
    path = tmp_path / "dpo.jsonl"
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "score": 3}
    path.write_text("\ufeff" + json.dumps(row) + "\n\n" + json.dumps(row), encoding="utf-8")
    assert load_pairs(path) == [PreferencePair("q", "good", "bad")] * 2


def test_rows_without_the_newer_fields_have_their_defaults(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text('{"query": "q", "helpful": "a", "harmful": "b", "weight": 3}\n', encoding="utf-8")
    assert load_pairs(path) == [PreferencePair("q", "a", "b", "", "", False, 0, 3.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "q"', "line 2 is not JSON"),
        (b"[1, 2]", "line 2 is not a JSON object"),
        (b'{"query": "q", "helpful": "\xff", "harmful": "b"}', r"is not UTF-8 \(line 2\)"),
        (b'{"query": "q", "helpful": "a"}', "line 2 has no str `harmful`"),
        (b'{"query": "q", "helpful": "a", "harmful": 3}', "line 2 has no str `harmful`"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (
            b'{"prompt": "q", "chosen": [{"role": "user"}], "rejected": "b"}',
            "line 2: `chosen` is a list, but",
        ),
        (b'{"prompt": "q", "chosen": "a"}', "line 2 has no str `rejected`"),
        (b'{"query": "q", "chosen": "a", "rejected": "b"}', "line 2 has no str `prompt`"),
        (b'{"chosen": "a", "rejected": "b", "query": "q"}', "line 2 has no str `prompt`"),
        (b'{"prompt": "q", "chosen": "a", "rejected": null}', "line 2 has no str `rejected`"),
        (b'{"prompt": "q", "chosen": "a", "rejected": []}', "line 2: `rejected` is an empty list"),
        (
            b'{"prompt": "q", "chosen": "[{\'role\': \'user\'}]", "rejected": "b"}',
            "list .* written as a text",
        ),
        (b'{"query": "q", "helpful": "a", "harmful": "b", "sample": "x"}', "line 2 has no int `sample`"),
        (b'{"query": "q", "helpful": "a", "harmful": "b", "sample": true}', "line 2 has no int `sample`"),
        (b'{"query": "q", "helpful": "a", "harmful": "b", "weight": 0}', "line 2: the weight is 0.0"),
        (b'{"query": "q", "helpful": "a", "harmful": "b", "weight": -1}', "line 2: the weight is -1.0"),
        (b'{"query": "q", "helpful": "a", "harmful": "b", "weight": NaN}', "line 2: the weight is nan"),
        (b'{"query": "q", "helpful": "a", "harmful": "b", "weight": 1e999}', "line 2: the weight is inf"),
    ],
)
def test_malformed_line_is_refused_by_number(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"query": "q", "helpful": "a", "harmful": "b"}\n' + line + b"\n")
    with pytest.raises(QueryError, match=message):
        load_pairs(path)


ROW = {"prompt": "Bake?", "chosen": "With care.", "rejected": "Go away."}
PAIR = PreferencePair("Bake?", "With care.", "Go away.")
OWN = {"query": "Bake?", "helpful": "With care.", "harmful": "Go away."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def in_any_order(row):
    for names in permutations(row):
        yield {name: row[name] for name in names}


def loaded(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_pairs(path)


@pytest.mark.parametrize(
    "more",
    [
        {"query": "q-0"},
        {"harmful": True},
        {"query": "q-0", "harmful": "yes"},
        {"helpful": 3.5, "harmful": 0, "weight": "heavy", "sample": "s-1"},
    ],
)
def test_foreign_fields_are_taken_whole_whatever_stands_beside_them(tmp_path, more):
    rows = list(in_any_order({**ROW, **more})) if len(more) < 3 else [{**ROW, **more}, {**more, **ROW}]
    assert loaded(tmp_path / "dpo.jsonl", rows) == [PAIR] * len(rows)


@pytest.mark.parametrize(
    "more", [{"prompt": "p-0"}, {"chosen": "A", "rejected": 3}, {"prompt": [1], "chosen": ""}]
)
def test_own_fields_are_taken_whole_whatever_stands_beside_them(tmp_path, more):
    rows = list(in_any_order({**OWN, **more}))
    assert loaded(tmp_path / "own.jsonl", rows) == [PAIR] * len(rows)


def test_both_kinds_of_fields_must_agree(tmp_path):
    path = tmp_path / "both.jsonl"
    assert loaded(path, [{**OWN, **ROW}, {**ROW, **OWN, "prompt": " Bake?"}]) == [PAIR] * 2
    for own, foreign in zip(OWN, ROW, strict=True):
        for row in ({**OWN, **ROW, foreign: "other"}, {**ROW, **OWN, own: "other"}):
            with pytest.raises(QueryError, match=f"line 2: `{own}` and `{foreign}` contradict each other"):
                loaded(path, [ROW, row])


def test_pairs_are_read_from_every_form_of_table(tmp_path):
    rows = [{**OWN, "sample": 1, "truncated": True, "weight": 2.0}, {**OWN, "truncated": False}]
    expected = [replace(PAIR, sample=1, truncated=True, weight=2.0), PAIR]
    jsonl = "\n".join(map(json.dumps, rows)).encode()
    table = (
        b"query;helpful;harmful;sample;truncated;weight\r\n"
        b"Bake?;With care.;Go away.;1;TRUE;2\r\nBake?;With care.;Go away.;;false;\r\n"
    )
    for name, data in {
        "pairs.json": json.dumps(rows, indent=1).encode(),
        "pairs.jsonl.gz": gzip.compress(jsonl),
        "pairs.NDJSON": jsonl,
        "pairs": jsonl,
        "pairs.csv": table,
    }.items():
        (tmp_path / name).write_bytes(data)
        assert load_pairs(tmp_path / name) == expected, name


def test_pairs_are_read_from_parquet_as_the_hub_has_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {**ROW, "chosen": [user("Bake?"), assistant("With care.")], "prompt_id": "0"}
    row["rejected"] = [user("Bake?"), assistant("Go away.")]
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "train.parquet")
    assert load_pairs(tmp_path / "train.parquet") == [PAIR] * 2


QUESTION, GOOD, BAD = user("Bake?"), assistant("With care."), assistant("Go away.")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": "Bake?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": "Bake?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [QUESTION], "chosen": "With care.", "rejected": "Go away."},
        {
            "prompt": [{"role": "system", "content": ""}, QUESTION],
            "chosen": [QUESTION, {**GOOD, "weight": 1}],
            "rejected": [BAD],
        },
    ],
)
def test_messages_are_read_in_the_forms_that_data_sets_have(tmp_path, row):
    rows = list(in_any_order(row))
    assert loaded(tmp_path / "dpo.jsonl", rows) == [PAIR] * len(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no str `prompt`"),
        (
            {"chosen": [QUESTION, GOOD], "rejected": [user("Boil?"), BAD]},
            "`chosen` and `rejected` ask different",
        ),
        (
            {"prompt": "Boil?", "chosen": [QUESTION, GOOD], "rejected": [BAD]},
            "`prompt` and `chosen` ask different",
        ),
        (
            {"prompt": "Bake?", "chosen": [QUESTION], "rejected": [BAD]},
            "last message of `chosen` is not the assis",
        ),
        (
            {"chosen": [QUESTION, BAD, user("Please?"), GOOD], "rejected": [QUESTION, BAD]},
            r"`chosen` is a conversation \(user, assistant, user\).*cannot hold",
        ),
        (
            {
                "prompt": [{"role": "system", "content": "Be kind."}, QUESTION],
                "chosen": [GOOD],
                "rejected": [BAD],
            },
            r"`prompt` is a conversation \(system, user\)",
        ),
        (
            {"prompt": "Bake?", "chosen": [{"from": "gpt", "value": "a"}], "rejected": "b"},
            "list, but not of messages",
        ),
        (
            {"prompt": "Bake?", "chosen": [{**GOOD, "content": None}], "rejected": "b"},
            "list, but not of messages",
        ),
    ],
)
def test_messages_that_are_no_pair_are_refused_by_their_line(tmp_path, row, message):
    with pytest.raises(QueryError, match=f"dpo.jsonl, line 2.*{message}") as refusal:
        loaded(tmp_path / "dpo.jsonl", [ROW, row])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "data"), [("p.jsonl", ""), ("p.jsonl", "\n \n"), ("p.json", "[]"), ("p.csv", "a\n")]
)
def test_file_without_pairs_is_named(tmp_path, name, data):
    (tmp_path / name).write_text(data)
    with pytest.raises(QueryError, match=f"{name} holds no pairs"):
        load_pairs(tmp_path / name)


def test_text_is_no_table_of_pairs(tmp_path):
    (tmp_path / "p.txt").write_text("How do I bake?\n")
    with pytest.raises(QueryError, match="line 1 is not JSON but text; a pair needs"):
        load_pairs(tmp_path / "p.txt")


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(QueryError, match="No such file"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(WorkDirectoryError, match="cannot open"):
        PairStore(tmp_path / "no folder" / "pairs.jsonl")
