"""Hostile texts in the forms that users bring: pairs, queries, prompts templates, and rows of a journal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from alignez_gguf.evaluation.queries import load_evaluation_queries
from alignez_gguf.pairs.pairs import PairStore, load_pairs
from alignez_gguf.prompts.queries import load_queries
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.storage.journal import Journal

_PAIR = {
    "query": "How do I bake?",
    "helpful": "With care.",
    "harmful": "Go away.",
    "sample": 0,
    "weight": 1.5,
}
_TEMPLATES = """version = "1"
plain = "{few_shot}Q: {query}"
few_shot = ""
stop = ["Q:"]
[helpful]
characteristics = "{query} good"
answer = "{query} {characteristics}"
[harmful]
characteristics = "{query} bad"
answer = "{query} {characteristics}"
"""
_TEXTS: tuple[tuple[str, bytes], ...] = (
    (".pairs.jsonl", (json.dumps(_PAIR) + "\n").encode() * 3),
    (".pairs.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'),
    (".jsonl", b'{"query": "a cake", "harmful": false}\n{"query": "a lock", "harmful": true}\n'),
    (".json", b'[{"prompt": "a cake"}, {"prompt": "a lock"}]'),
    (".csv", b'query,harmful\n"a cake",false\n"a ""lock""",true\n'),
    (".txt", "a cake\na lock\r\nGrüße\n".encode()),
    (".toml", _TEMPLATES.encode()),
    (".journal.jsonl", b'{"key": "a", "value": {"b": 1}, "sha256": "8d84fa0e1d3d5b4c"}\n'),
)
_TOKENS = (
    *(b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"1e999", b"NaN", b"-0", b"null", b"true", b'"'),
    *(b"\\ud800", b"\\u0000", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b"\xe2\x80\xa8", b","),
    *(
        b"{query}",
        b"'''",
        b'"""',
        b"[aspects.a.helpful]\n",
        b"\nx = 9999-99-99\n",
        b"\nx = " + b"9" * 5000 + b"\n",
        b"\nx = " + b"[" * 20_000,
        b"x." * 5000,
        b"{",
        b"}",
    ),
)


def text(seed: int, number: int) -> tuple[str, bytes]:
    """Text `number` of the ones that `seed` makes, with the ending that says what it should be."""
    random = Random(seed << 40 | number)
    ending, data = random.choice(_TEXTS)
    for _ in range(random.choice((1, 1, 2, 4))):
        data = _damaged(random, data)
    return ending, data


def read(path: Path) -> None:
    """Read a text as what its ending says. Raises `AlignezError`."""
    for ending, readers in _READERS.items():
        if path.name.endswith(ending):
            for one in readers:
                one(path)
            return
    for queries in (load_queries, load_evaluation_queries):
        queries(str(path))


def _damaged(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 2, 8, 40)))
    kind = random.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at] + random.choice(_TOKENS) + data[end:]
    if kind == 3:
        return data[:at] + data[at:end] * random.choice((2, 3, 50)) + data[end:]
    return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]


def _read_journal(path: Path) -> None:
    Journal(path).close()


def _read_store(path: Path) -> None:
    PairStore(path).close()


_READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    ".pairs.jsonl": (load_pairs,),
    ".journal.jsonl": (_read_journal, _read_store),
    ".toml": (Templates.from_file,),
}
