from __future__ import annotations

import json

import pytest

from alignez_gguf.errors import QueryError, WorkDirectoryError
from alignez_gguf.pairs import PairStore, PreferencePair, load_pairs

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
        (b'{"query": "q", "helpful": "\xff", "harmful": "b"}', "line 2 is not UTF-8"),
        (b'{"query": "q", "helpful": "a"}', "line 2 has no str `harmful`"),
        (b'{"query": "q", "helpful": "a", "harmful": 3}', "line 2 has no str `harmful`"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"prompt": "q", "chosen": [{"role": "user"}], "rejected": "b"}', "line 2 has no str `helpful`"),
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


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(QueryError, match="No such file"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(WorkDirectoryError, match="cannot open"):
        PairStore(tmp_path / "no folder" / "pairs.jsonl")
