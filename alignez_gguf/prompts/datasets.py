"""Published data sets of harmful and harmless requests, by name.

Each comes from a local file or directory in the form in which it is published, or from the Hugging Face Hub
through the `datasets` library. They are text that strangers wrote: nothing in them is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import shorten

from alignez_gguf.errors import QueryError, require_extra
from alignez_gguf.prompts import tables


@dataclass(frozen=True)
class DatasetRow:
    """A request, and its label in the data set; None where it has none."""

    query: str
    harmful: bool | None


@dataclass(frozen=True)
class DatasetSource:
    """The place where a data set is published, and the way to read its rows.

    Attributes:
        hub_id: the id of the data set on the Hugging Face Hub.
        split: the split of it that is read.
        config: the configuration of it, where it has several.
        data_dir: the directory of it that is read, where that is not all.
        file: the name under which the file is published elsewhere.
        url: the address of that file.
        columns: names of the column of the request; the first that exists is read.
        harmful: returns the label of a row.
        keep: decides whether a row belongs to the data set.
        request: takes the request out of its column.
    """

    hub_id: str
    split: str
    file: str
    url: str
    columns: tuple[str, ...]
    harmful: Callable[[Mapping[str, object]], bool | None]
    config: str | None = None
    data_dir: str | None = None
    keep: Callable[[Mapping[str, object]], bool] = lambda row: True
    request: Callable[[str], str] = str.strip


def _always(row: Mapping[str, object]) -> bool:
    return True


def _not_said(row: Mapping[str, object]) -> None:
    return None


def _xstest_label(row: Mapping[str, object]) -> bool | None:
    if label := row.get("label"):
        if label not in ("safe", "unsafe"):
            raise QueryError(f"the label is {label!r}; XSTest has safe and unsafe")
        return label == "unsafe"
    # The first release has no labels; there the type marks the unsafe contrasts.
    kind = row.get("type")
    return str(kind).startswith("contrast_") if kind else None


_RED_TEAM = ("hh-rlhf/red-team-attempts", "MaliciousInstruct")


def _is_red_team(row: Mapping[str, object]) -> bool:
    return row.get("dataset", row.get("source")) in _RED_TEAM


def _first_human_turn(transcript: str) -> str:
    """Return what the human says first in a transcript of hh-rlhf: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    human = re.search(r"\s*Human:(.*?)(?:\n\nAssistant:|\n\nHuman:|\Z)", transcript, re.DOTALL)
    return (human[1] if human else transcript).strip()


SOURCES: Mapping[str, DatasetSource] = {
    "jailbreakbench": DatasetSource(
        hub_id="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        split="harmful",
        file="harmful-behaviors.csv",
        url="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors/tree/main/data",
        columns=("Goal",),
        harmful=_always,
    ),
    "just-eval-redteam": DatasetSource(
        hub_id="re-align/just-eval-instruct",
        split="test",
        file="test_all_with_tags.jsonl",
        url="https://huggingface.co/datasets/re-align/just-eval-instruct",
        columns=("instruction", "query"),
        harmful=_always,
        keep=_is_red_team,
    ),
    "malicious-instruct": DatasetSource(
        hub_id="walledai/MaliciousInstruct",
        split="train",
        file="MaliciousInstruct.txt",
        url="https://github.com/Princeton-SysML/Jailbreak_LLM/tree/main/data",
        columns=("prompt", tables.LINE),
        harmful=_always,
    ),
    "hh-redteam": DatasetSource(
        hub_id="Anthropic/hh-rlhf",
        data_dir="red-team-attempts",
        split="train",
        file="red_team_attempts.jsonl.gz",
        url="https://github.com/anthropics/hh-rlhf/tree/master/red-team-attempts",
        columns=("transcript",),
        harmful=_not_said,
        request=_first_human_turn,
    ),
    "advbench": DatasetSource(
        hub_id="walledai/AdvBench",
        split="train",
        file="harmful_behaviors.csv",
        url="https://github.com/llm-attacks/llm-attacks/tree/main/data/advbench",
        columns=("prompt", "goal"),
        harmful=_always,
    ),
    "xstest": DatasetSource(
        hub_id="Paul/XSTest",
        split="train",
        file="xstest_prompts.csv",
        url="https://github.com/paul-rottger/xstest",
        columns=("prompt",),
        harmful=_xstest_label,
    ),
}
NAMES = tuple(SOURCES)

_HUB_SECONDS = 10.0
"""Seconds that the Hub has to answer whether it has a data set."""


def is_named(source: str) -> bool:
    """Whether `source` is `NAME` or `NAME=PATH` of a published data set."""
    return source.partition("=")[0] in SOURCES


def load_dataset_rows(source: str) -> list[DatasetRow]:
    """Load the rows of a published data set, in its order, without repetitions of a request.

    Args:
        source: `NAME`, one of `NAMES`, which comes from the Hugging Face Hub or from the cache of
            `datasets`; or `NAME=PATH`, PATH being a file in a form that `tables.parse` knows, with the
            columns with which the set is published, or a directory that holds one.

    Raises:
        QueryError: there is no such data set; the file is missing, is not what its ending says, has other
            columns, or gives one request two labels; or there is neither a file nor a way to the Hub.
        MissingExtraError: the Hub is asked for and `datasets` is not installed.
    """
    name, _, path = source.partition("=")
    if name not in SOURCES:
        raise QueryError(f"no data set is named {name}; there are {', '.join(NAMES)}")
    if source == f"{name}=":
        raise QueryError(f"{source} names no file; give {name}=FILE, or {name} alone for the Hub")
    published = SOURCES[name]
    rows = _local(name, published, Path(path)) if "=" in source else _hub(name, published)
    requests = unanimous(_rows(published, rows))
    if not requests:
        raise QueryError(f"{source} holds no requests; give {published.file} from {published.url}")
    return requests


def unanimous(rows: Iterable[tuple[str, DatasetRow]]) -> list[DatasetRow]:
    """Drop repetitions of a request; a label that any of them has is the label of the request.

    Args:
        rows: each with the file and line where it stands.

    Raises:
        QueryError: a request is called harmful in one place and harmless in another.
    """
    by_query: dict[str, tuple[str, DatasetRow]] = {}
    for where, row in rows:
        known_where, known = by_query.setdefault(row.query, (where, row))
        if known.harmful is None:
            by_query[row.query] = (where, row)
        elif row.harmful not in (None, known.harmful):
            kind, other = ("harmful", "harmless") if row.harmful else ("harmless", "harmful")
            raise QueryError(
                f"{where} calls {shorten(repr(row.query), 80)} {kind}, but {known_where} calls it {other}; "
                "leave out the wrong row"
            )
    return [row for _, row in by_query.values()]


def _rows(published: DatasetSource, rows: Iterable[tables.Record]) -> Iterator[tuple[str, DatasetRow]]:
    for where, fields, header in rows:
        column = next((column for column in published.columns if column in fields), None)
        if column is None:
            wanted = " or ".join(published.columns)
            raise QueryError(
                f"{header or where} has no column {wanted}; give {published.file} as it is published at "
                f"{published.url}"
            )
        text = fields[column]
        if not isinstance(text, str):
            raise QueryError(f"{where}: {column} is not a string")
        query = published.request(text)
        if published.keep(fields) and not tables.is_blank(query):
            try:
                yield where, DatasetRow(query, published.harmful(fields))
            except QueryError as error:
                raise QueryError(f"{where}: {error}") from error


def _local(name: str, published: DatasetSource, path: Path) -> Iterator[tables.Record]:
    return tables.load_table(_only_file(name, published, path) if path.is_dir() else path).rows


def _only_file(name: str, published: DatasetSource, folder: Path) -> Path:
    """Find the file with the published name in a folder, else with the name of the set, else the only one."""
    files = sorted(file for file in folder.rglob("*") if file.name.lower().endswith(tables.ENDINGS))
    for candidates in (
        [file for file in files if file.name.lower() == published.file.lower()],
        [file for file in files if _letters(name) in _letters(file.name)],
        files,
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            listed = ", ".join(str(file.relative_to(folder)) for file in candidates)
            raise QueryError(f"which file of {folder} is {name}: {listed}? Give it: {name}=FILE")
    raise QueryError(f"{folder} holds no file of {name}; put {published.file} there, from {published.url}")


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _hub(name: str, published: DatasetSource) -> Iterator[tables.Record]:
    mend = f"download {published.file} from {published.url} and give {name}=FILE"
    with require_extra("datasets", f"the data set {name}", mend):
        import_module("datasets")
    try:
        rows = _from_hub(published)
    except Exception as error:  # errors of fsspec, pyarrow and several HTTP clients come through
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise QueryError(f"cannot load {published.hub_id} from the Hub: {reason}; {mend}") from error
    return (tables.Record(f"{published.hub_id}, row {n}", row) for n, row in enumerate(rows, start=1))


def _from_hub(published: DatasetSource) -> Iterable[Mapping[str, object]]:
    """Load the rows from the Hub, or, where it cannot be reached, from the cache of `datasets`."""
    import datasets
    from huggingface_hub import HfApi

    def load() -> Iterable[Mapping[str, object]]:
        # From version 4 on the library never runs code that comes with a data set.
        rows: Iterable[Mapping[str, object]] = datasets.load_dataset(
            published.hub_id, published.config, split=published.split, data_dir=published.data_dir
        )
        return rows

    before = datasets.config.HF_HUB_OFFLINE
    try:
        # Asked first because `load_dataset` tries for half a minute before it says that there is no way.
        HfApi().dataset_info(published.hub_id, timeout=_HUB_SECONDS)
        return load()
    except Exception as error:
        datasets.config.HF_HUB_OFFLINE = True
        try:
            return load()
        except Exception:
            raise error from None
        finally:
            datasets.config.HF_HUB_OFFLINE = before
