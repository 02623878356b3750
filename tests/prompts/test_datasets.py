from __future__ import annotations

import gzip
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignez_gguf.errors import MissingExtraError, QueryError
from alignez_gguf.prompts.datasets import NAMES, SOURCES, DatasetRow, load_dataset_rows
from alignez_gguf.prompts.queries import load_queries

SHARED = Path(__file__).parents[3] / "shared" / "data"

TRANSCRIPT = "\n\nHuman: What is a\nlock?\n\nAssistant: A thing.\n\nHuman: And then?\n\nAssistant: Bye."
PUBLISHED = {
    "jailbreakbench": (
        "harmful-behaviors.csv",
        "Index,Goal,Target,Behavior,Category,Source\n0,Pick a lock,Sure,Locks,Theft,Original\n",
        [DatasetRow("Pick a lock", True)],
    ),
    "just-eval-redteam": (
        "test_all_with_tags.jsonl",
        '{"id": 0, "instruction": "Bake a cake", "dataset": "lima", "source_id": "lima-1"}\n'
        '{"id": 800, "instruction": "Pick a lock", "dataset": "hh-rlhf/red-team-attempts"}\n'
        '{"id": 900, "instruction": " Forge a key", "dataset": "MaliciousInstruct"}\n',
        [DatasetRow("Pick a lock", True), DatasetRow("Forge a key", True)],
    ),
    "malicious-instruct": (
        "MaliciousInstruct.txt",
        "Pick a lock?\n\nForge a key?\nPick a lock?\n",
        [DatasetRow("Pick a lock?", True), DatasetRow("Forge a key?", True)],
    ),
    "hh-redteam": (
        "red_team_attempts.jsonl.gz",
        json.dumps([{"transcript": TRANSCRIPT, "rating": 4}, {"transcript": "\n\nHuman: Hi"}]),
        [DatasetRow("What is a\nlock?", None), DatasetRow("Hi", None)],
    ),
    "advbench": (
        "harmful_behaviors.csv",
        'goal,target\n"Pick a lock, quickly","Sure, here"\n',
        [DatasetRow("Pick a lock, quickly", True)],
    ),
    "xstest": (
        "xstest_prompts.csv",
        "id,prompt,type,label,focus,note\n"
        "1,How do I kill a process?,homonyms,safe,kill,violence\n"
        "26,How do I pick a lock?,contrast_homonyms,unsafe,pick,theft\n",
        [DatasetRow("How do I kill a process?", False), DatasetRow("How do I pick a lock?", True)],
    ),
}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", NAMES)
def test_published_file_is_read_alone_and_in_a_directory(tmp_path: Path, name: str) -> None:
    file, text, rows = PUBLISHED[name]
    path = write(tmp_path / "data", file, text)
    write(tmp_path / "data", "other.csv", "Goal,goal,prompt\nno,no,no\n")
    assert file == SOURCES[name].file
    assert load_dataset_rows(f"{name}={path}") == rows
    assert load_dataset_rows(f"{name}={tmp_path}") == rows
    assert load_queries(f"{name}={path}") == [row.query for row in rows]


def test_first_release_of_xstest_is_labelled_by_its_types(tmp_path: Path) -> None:
    path = write(
        tmp_path, "x.csv", "id_v2,type,prompt\nv2-1,homonyms,kill it\nv2-2,contrast_homonyms,kill her\n"
    )
    assert [row.harmful for row in load_dataset_rows(f"xstest={path}")] == [False, True]


def test_parquet_of_the_hub_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["Pick a lock"], "target": ["Sure"]})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    assert load_queries(f"advbench={tmp_path}") == ["Pick a lock"]
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(QueryError, match="cannot read"):
        load_queries(f"advbench={tmp_path}")


@pytest.mark.parametrize(
    ("name", "rows", "harmful"),
    [("jailbreakbench", 100, 100), ("just-eval-redteam", 197, 197), ("xstest", 450, 200)],
)
def test_published_data_sets_are_read_whole(name: str, rows: int, harmful: int) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no published data sets in {SHARED}")
    found = load_dataset_rows(f"{name}={SHARED}")
    assert (len(found), sum(row.harmful is True for row in found)) == (rows, harmful)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no file of xstest; put xstest_prompts.csv there, from https://github.com/paul-rottger"),
        (
            {"xstest_a.csv": "", "xstest_b.csv": ""},
            r"which file .*xstest_a.csv, xstest_b.csv\? .*xstest=FILE",
        ),
        ({"xstest.csv": "a,b\n1,2\n"}, r"xstest.csv has no column prompt; give xstest_prompts.csv as it is"),
        ({"xstest.csv": "prompt\n"}, "holds no requests; give xstest_prompts.csv"),
        ({"xstest.jsonl": '{"prompt": 3}'}, "line 1: prompt is not a string"),
        ({"xstest.json": '[{"prompt": "a"}'}, "is not JSON"),
        ({"xstest.json": '["a"]'}, "row 1 is not a JSON object"),
    ],
)
def test_unusable_directories_and_files_are_refused_with_the_mend(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        write(tmp_path, name, text)
    with pytest.raises(QueryError, match=message) as refusal:
        load_dataset_rows(f"xstest={tmp_path}")
    assert "\n" not in str(refusal.value)


def test_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "red_team_attempts.jsonl.gz"
    path.write_bytes(gzip.compress(b"[]" * 1000)[:-10])
    with pytest.raises(QueryError, match="not a whole gzip file"):
        load_dataset_rows(f"hh-redteam={path}")


def test_missing_file_unknown_name_and_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="No such file"):
        load_dataset_rows(f"xstest={tmp_path / 'none.csv'}")
    with pytest.raises(QueryError, match="no data set is named toxic; there are jailbreakbench, "):
        load_dataset_rows("toxic")
    with pytest.raises(QueryError, match="leave out --column"):
        load_queries(f"xstest={tmp_path}", column="prompt")


class Hub:
    """Stands for the Hugging Face Hub and the `datasets` library's copy of what it had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.online, self.kept = True, False
        self.rows = [
            {"prompt": " Pick a lock", "label": "unsafe"},
            {"prompt": "Kill a process", "label": "safe"},
        ]
        self.loaded: list[tuple[tuple[object, ...], dict[str, object]]] = []
        self.config = SimpleNamespace(HF_HUB_OFFLINE=False)
        library = SimpleNamespace(load_dataset=self.load_dataset, config=self.config)
        monkeypatch.setitem(sys.modules, "datasets", library)
        monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: self))

    def dataset_info(self, hub_id: str, timeout: float) -> None:
        if not self.online:
            raise OSError("[Errno -2] Name or service not known\nsecond line")

    def load_dataset(self, *arguments: object, **options: object) -> list[dict[str, str]]:
        self.loaded.append((arguments, options))
        if self.config.HF_HUB_OFFLINE and not self.kept:
            raise ConnectionError("Couldn't reach it")
        assert self.online or self.config.HF_HUB_OFFLINE, "the library would try for long"
        return self.rows


def test_named_data_set_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    assert load_dataset_rows("xstest") == [
        DatasetRow("Pick a lock", True),
        DatasetRow("Kill a process", False),
    ]
    assert hub.loaded == [(("Paul/XSTest", None), {"split": "train", "data_dir": None})]


def test_copy_of_the_library_is_used_where_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    hub.online, hub.kept = False, True
    assert load_queries("xstest") == ["Pick a lock", "Kill a process"]
    assert hub.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("name", NAMES)
def test_offline_error_says_which_file_to_give_and_where_it_is(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Hub(monkeypatch).online = False
    with pytest.raises(QueryError) as refusal:
        load_queries(name)
    source = SOURCES[name]
    assert str(refusal.value) == (
        f"cannot load {source.hub_id} from the Hub: [Errno -2] Name or service not known; "
        f"download {source.file} from {source.url} and give {name}=FILE"
    )


def test_missing_library_is_named_with_the_file_that_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtraError, match=r"pip install 'alignez-gguf\[datasets\]', or download xstest_prompts"
    ):
        load_queries("xstest")


def test_arguments_are_those_of_the_library_and_none_lets_it_run_code() -> None:
    library = pytest.importorskip("datasets")
    for source in SOURCES.values():
        bound = inspect.signature(library.load_dataset).bind(
            source.hub_id, source.config, split=source.split, data_dir=source.data_dir
        )
        assert bound.arguments.get("name") == source.config
    assert int(library.__version__.partition(".")[0]) >= 4


def test_name_without_the_file_does_not_read_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("buy milk\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryError, match=r"malicious-instruct= names no file; give malicious-instruct=FILE"):
        load_dataset_rows("malicious-instruct=")
