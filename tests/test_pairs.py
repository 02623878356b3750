from __future__ import annotations

import json

import pytest

from alignez_gguf.errors import QueryError
from alignez_gguf.pairs import PairFilterReport, PairStore, PreferencePair, filter_pairs, load_pairs

FIRST = PreferencePair("How do I bake?", "With care,\nslowly.", "Don't.", "be kind", "be rude")
SECOND = PreferencePair("Grüße?", "Schöne Grüße 🙂", "No\u2028greeting", truncated=True)


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "q"', "line 2 is not JSON"),
        (b"[1, 2]", "line 2 is not a JSON object"),
        (b'{"query": "q", "helpful": "\xff", "harmful": "b"}', "line 2 is not UTF-8"),
        (b'{"query": "q", "helpful": "a"}', "line 2 has no str `harmful`"),
        (b'{"query": "q", "helpful": "a", "harmful": 3}', "line 2 has no str `harmful`"),
        (b"[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_malformed_line_is_refused_by_number(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"query": "q", "helpful": "a", "harmful": "b"}\n' + line + b"\n")
    with pytest.raises(QueryError, match=message):
        load_pairs(path)
    with pytest.raises(QueryError, match=message):
        PairStore(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(QueryError, match="No such file"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(QueryError, match="cannot open"):
        PairStore(tmp_path / "no folder" / "pairs.jsonl")


def test_filter_leaves_out_what_says_nothing_and_counts_it():
    long = "first whisk the eggs then add the flour and the milk and bake it for an hour"
    pairs = [
        PreferencePair("kept", "I will help you.", "Get lost."),
        PreferencePair("kept", "One two three.", "Four five six.", truncated=True),
        PreferencePair("empty", "  \n", "Get lost."),
        PreferencePair("empty", "I will help you.", ""),
        PreferencePair("identical", "The  SAME answer", "the same\nanswer"),
        PreferencePair("near", long, long.replace("hour", "day")),
    ]
    kept, report = filter_pairs(pairs)
    assert [pair.query for pair in kept] == ["kept", "kept"]
    assert report == PairFilterReport(total=6, kept=2, empty=2, identical=1, near_identical=1, truncated=1)
