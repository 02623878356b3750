"""Whatever a user gets wrong: one line on standard error that names it, and nothing left behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.runtime import bindings
from tests.cli.conftest import PROGRAM, environment
from tests.silent_models import finish, write_bert, write_t5

if TYPE_CHECKING:
    from tests.cli.conftest import Run

Refused = Callable[..., str]

COMMANDS = {
    "export": ("-q", "demo", "-o", "out.gguf"),
    "pairs": ("-q", "demo", "-o", "out.jsonl"),
    "generate": ("-p", "x", "-o", "out.jsonl"),
    "chat": (),
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Files that are no usable model."""
    whole = demo.MODEL.read_bytes()
    files = {
        "text.gguf": b"I am not a model.\n" * 100,
        "empty.gguf": b"",
        "cut.gguf": whole[: len(whole) // 2],
    }
    files["header.gguf"] = whole[:1000]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    return {
        "missing": "none.gguf",
        "cut in the weights": "cut.gguf",
        "cut in the header": "header.gguf",
        "text": "text.gguf",
        "empty": "empty.gguf",
    }


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", ["missing", "cut in the weights", "cut in the header", "text", "empty"])
def test_unusable_model(refused: Refused, models: dict[str, str], command: str, what: str) -> None:
    line = refused(command, models[what], *COMMANDS[command])
    assert models[what] in line


JUDGED = ("-q", "two.jsonl", "--judge", "offline", "-o", "out.html")
NO_TEXT = {
    **{command: (command, "MODEL", *rest) for command, rest in COMMANDS.items()},
    "predict": ("predict", "MODEL", "-q", "demo", "--quick"),
    "verify": ("verify", "MODEL", "control.gguf"),
    "serve": ("serve", "MODEL"),
    "runtime": ("runtime", "status", "MODEL"),
    "convert": ("convert", "control.gguf", "MODEL", "--format", "stock", "-o", "out"),
    "evaluate": ("evaluate", "--base", "MODEL", "-c", "control.gguf", *JUDGED),
}


@pytest.mark.parametrize("arguments", NO_TEXT.values(), ids=NO_TEXT)
@pytest.mark.parametrize(("write", "kind"), [(write_t5, "encoder-decoder"), (write_bert, "embedding")])
def test_model_that_writes_no_text(
    refused: Refused,
    tmp_path: Path,
    control: str,
    arguments: tuple[str, ...],
    write: Callable[[Path], Path],
    kind: str,
) -> None:
    write(tmp_path / "silent.gguf")
    (tmp_path / "control.gguf").write_bytes(Path(control).read_bytes())
    rows = '{"query": "How?", "harmful": true}\n{"query": "Why?", "harmful": false}\n'
    (tmp_path / "two.jsonl").write_text(rows, encoding="utf-8")
    line = refused(*("silent.gguf" if argument == "MODEL" else argument for argument in arguments))
    assert f"silent.gguf is an {kind} model" in line


def test_folder_that_holds_no_transformers_model(refused: Refused, models: dict[str, str]) -> None:
    assert "folder" in refused("export", "folder", *COMMANDS["export"])


@pytest.mark.parametrize("name", ["none.GGUF", "./org/none", "/none", "some/deep/none"])
@pytest.mark.parametrize("command", ["export", "predict"])
def test_mistyped_path_of_a_model_is_never_a_name_on_the_hub(
    refused: Refused, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("huggingface_hub.HfApi.model_info")
    monkeypatch.delattr("transformers.AutoTokenizer.from_pretrained")
    output = ("--quick",) if command == "predict" else ("-o", "out.gguf")
    line = refused(command, name, "-q", "demo", *output)
    assert re.search(rf"no model directory {name}|cannot read the model {name}: No such file", line), line


@pytest.mark.parametrize("command", ["pairs", "generate", "chat"])
def test_folder_as_model_is_bad_usage(refused: Refused, models: dict[str, str], command: str) -> None:
    assert "folder" in refused(command, "folder", *COMMANDS[command], exit_code=2)


@pytest.fixture
def controls(tmp_path: Path, control: str) -> dict[str, str]:
    """Files that cannot steer the demo model, with what the message must say of each."""
    loaded = ControlFile.load(control)
    deeper = replace(loaded.model, n_layer=loaded.model.n_layer + 1)
    ControlFile(deeper, loaded.edits).save(tmp_path / "deeper.gguf")
    ControlFile(replace(loaded.model, arch="qwen3"), loaded.edits).save(tmp_path / "qwen3.gguf")
    whole = Path(control).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    (tmp_path / "text.gguf").write_bytes(b"not a control file")
    reader = gguf.GGUFReader(control)
    direction = next(tensor for tensor in reader.tensors if tensor.name.startswith("direction."))
    broken = bytearray(whole)
    broken[direction.data_offset + 8 : direction.data_offset + 12] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(broken)
    layers = f"with {loaded.model.n_layer} layers"
    n_layer, n_embd = loaded.model.n_layer, loaded.model.n_embd
    writer = gguf.GGUFWriter(tmp_path / "beyond.gguf", "controlvector")
    writer.add_tensor(f"direction.{n_layer}", np.ones(n_embd, np.float32))
    finish(writer)
    return {
        "beyond.gguf": f"edits layer {n_layer}, but the model is .*, numbered from 0 to {n_layer - 1}",
        "deeper.gguf": f"with {deeper.n_layer} layers.*{layers}",
        "qwen3.gguf": "for qwen3 .*but the model is llama ",
        "cut.gguf": "it ends inside ",
        "text.gguf": "is not a usable control file",
        "nan.gguf": f"{direction.name} has values that are NaN",
        "none.gguf": "No such file",
    }


@pytest.mark.parametrize(
    "name",
    ["deeper.gguf", "beyond.gguf", "qwen3.gguf", "cut.gguf", "text.gguf", "nan.gguf", "none.gguf"],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_unusable_control_file(
    refused: Refused, model: str, controls: dict[str, str], command: str, name: str
) -> None:
    line = refused(command, model, *COMMANDS[command], "-c", name)
    assert re.search(controls[name], line), line


@pytest.fixture
def query_files(tmp_path: Path) -> None:
    for name, data in {
        "empty.txt": b"",
        "blank.txt": b"\n \n",
        "latin.txt": b"good\nna\xefve\n",
        "columns.csv": b"a,b\n1,2\n",
        "rows.jsonl": b'{"query": "x"}\n{"query"\n',
        "deep.jsonl": b"[" * 100_000,
        "number.jsonl": b'{"query": 3, "prompt": 3}\n',
    }.items():
        (tmp_path / name).write_bytes(data)


@pytest.mark.usefixtures("query_files")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt: No such file"),
        ("empty.txt", "empty.txt holds no queries"),
        ("blank.txt", "blank.txt holds no queries"),
        ("latin.txt", "latin.txt is not UTF-8 (line 2)"),
        ("columns.csv", "columns.csv has no column"),
        ("rows.jsonl", "rows.jsonl, line 2 is not JSON"),
        ("deep.jsonl", "deep.jsonl, line 1 is not JSON"),
        ("number.jsonl", "number.jsonl, line 1"),
    ],
)
@pytest.mark.parametrize("command", ["export", "pairs"])
def test_unusable_queries(refused: Refused, model: str, command: str, name: str, message: str) -> None:
    assert message in refused(command, model, "-q", name, "-o", "out")


@pytest.mark.usefixtures("query_files")
def test_missing_column_is_named(refused: Refused, model: str) -> None:
    line = refused("export", model, "-q", "columns.csv", "--column", "goal", "-o", "out")
    assert "no column 'goal'" in line
    assert "a, b" in line


@pytest.mark.usefixtures("query_files")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt: No such file"),
        ("blank.txt", "blank.txt holds no prompts"),
        ("latin.txt", "latin.txt is not UTF-8 (line 2)"),
        ("rows.jsonl", "rows.jsonl, line 1 has no string `prompt`"),
        ("deep.jsonl", "deep.jsonl, line 1 is not JSON"),
        ("number.jsonl", "number.jsonl, line 1 has no string `prompt`"),
    ],
)
def test_unusable_prompts(refused: Refused, model: str, name: str, message: str) -> None:
    assert message in refused("generate", model, "--prompts", name)


LONG = "How do I bake a very long cake with many layers? " * 100


@pytest.mark.parametrize("command", ["export", "pairs", "generate"])
def test_query_longer_than_the_context_is_named(
    refused: Refused, model: str, tmp_path: Path, command: str
) -> None:
    (tmp_path / "queries.txt").write_text(f"short\n{LONG}\n", encoding="utf-8")
    option = "--prompts" if command == "generate" else "-q"
    line = refused(command, model, option, "queries.txt", "-o", "out", "--quiet")
    assert "How do I bake a very long cake" in line
    assert "more than the context" in line


def test_message_longer_than_the_context_is_named_and_the_chat_goes_on(run: Run, model: str) -> None:
    result = run("chat", model, "--max-tokens", "4", stdin=f"{LONG}\nHi\n")
    assert result.exit_code == 0
    assert "How do I bake a very long cake" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout.strip()


@pytest.mark.parametrize("command", ["export", "pairs", "generate"])
def test_unwritable_output_is_found_before_the_work(
    refused: Refused, model: str, tmp_path: Path, command: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    source = [*COMMANDS[command][:-1]]
    for output, exit_code in (("none/out", 1), ("file/out", 1), ("folder", 2)):
        # A model that does not exist: the output is looked at first.
        line = refused(command, "none.gguf", *source, output, exit_code=exit_code)
        assert output in line
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


@pytest.fixture
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    bindings._functions.cache_clear()


@pytest.mark.usefixtures("_unpatched")
@pytest.mark.parametrize("command", ["export", "generate", "chat"])
def test_unpatched_runtime_is_refused_with_the_command_that_mends_it(
    refused: Refused, model: str, control: str, command: str
) -> None:
    steer = [] if command == "export" else ["-c", control]
    assert "run: alignez-gguf runtime build" in refused(command, model, *COMMANDS[command], *steer)


@pytest.mark.usefixtures("_unpatched")
def test_unpatched_runtime_still_generates_unsteered(run: Run, model: str) -> None:
    assert run("generate", model, "-p", "x", "--max-tokens", "2").exit_code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_runtime_without_a_library_is_refused(model: str, tmp_path: Path, command: str) -> None:
    done = subprocess.run(
        [*PROGRAM, command, model, *COMMANDS[command]],
        env=environment(LLAMA_CPP_LIB_PATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: llama-cpp-python cannot be loaded")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "layers", ["99", "0-99", "3-1", "0,3-1", "a", "", "1-2-3", "-1", "0-99999999999", "1,,2"]
)
def test_bad_layers(refused: Refused, model: str, layers: str) -> None:
    assert f"the layers {layers!r} are not" in refused(
        "export", model, *COMMANDS["export"], "--layers", layers
    )


@pytest.mark.parametrize("name", ["none.jsonl", "rows.jsonl", "number.jsonl"])
@pytest.mark.usefixtures("query_files")
def test_unusable_pairs(refused: Refused, model: str, name: str) -> None:
    line = refused("export", model, "--pairs", name, "-o", "out")
    assert name in line


@pytest.mark.parametrize("what", ["missing", "cut in the weights", "text"])
def test_unusable_model_to_export_for(
    refused: Refused, models: dict[str, str], model: str, what: str
) -> None:
    assert models[what] in refused("export", model, *COMMANDS["export"], "--for", models[what])


def test_bad_scope_of_an_export_is_found_before_the_work(refused: Refused) -> None:
    asked = ("export", "none.gguf", *COMMANDS["export"])
    assert "the scope 'last:2' is unknown" in refused(*asked, "--scope", "last:2")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_bad_scope_and_strength(refused: Refused, model: str, control: str, command: str) -> None:
    asked = (command, model, *COMMANDS[command], "-c", control)
    assert "the scope 'first:0' is unknown" in refused(*asked, "--scope", "first:0")
    assert "the strength is -1.0" in refused(*asked, "--strength", "-1")
    assert "the strength is nan" in refused(*asked, "--strength", "nan")
    assert "the strength is inf" in refused(*asked, "--strength", "inf")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", ("-p", "x", "--prompts", "y.txt")),
        ("generate", ()),
        ("generate", ("-p", "x", "--stop", "")),
        ("generate", ("-p", "x", "--temperature", "nan")),
        ("generate", ("-p", "x", "--temperature", "inf")),
        ("generate", ("-p", "x", "--top-p", "nan")),
        ("generate", ("-p", "x", "--top-p", "0")),
        ("generate", ("-p", "x", "--max-tokens", "0")),
        ("generate", ("-p", "x", "--seed", "-1")),
        ("export", ("-q", "demo", "-o", "out", "--kl-budget", "inf")),
        ("export", ("-q", "demo", "-o", "out", "--kl-budget", "nan")),
        ("export", ("-q", "demo", "-o", "out", "--kl-budget", "0")),
        ("export", ("-q", "demo", "-o", "out", "--threshold", "nan")),
        ("export", ("-q", "demo", "-o", "out", "--seed", "-1")),
        ("export", ("-q", "demo", "-o", "out", "--seed", str(2**64))),
        ("export", ("-q", "demo", "-o", "out", "--recipe", "none")),
        ("export", ("-q", "demo", "-o", "out", "--format", "none")),
        ("export", ("-q", "demo", "-o", "out", "--hook", "none")),
        ("export", ("-q", "demo", "-o", "out", "--samples", "0")),
        ("export", ("--pairs", "pairs.jsonl", "-o", "out", "--mix", "nan")),
        ("export", ("-q", "demo", "-o", "out", "--choose", "0", "--work-dir", "w")),
        (
            "export",
            (
                "-q",
                "demo",
            ),
        ),
        ("chat", ("--temperature", "nan")),
    ],
)
def test_bad_usage_exits_with_2(
    refused: Refused, model: str, command: str, arguments: tuple[str, ...]
) -> None:
    refused(command, model, *arguments, exit_code=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_templates(refused: Refused, model: str, tmp_path: Path, command: str) -> None:
    (tmp_path / "broken.toml").write_text('version = "1"\nplain = ', encoding="utf-8")
    (tmp_path / "short.toml").write_text('version = "1"\n', encoding="utf-8")
    asked = (command, model, *COMMANDS[command], *(["--chat"] if command == "generate" else []))
    assert "broken.toml is not valid TOML" in refused(*asked, "--templates", "broken.toml")
    assert "short.toml" in refused(*asked, "--templates", "short.toml")
    assert "cannot read the templates none.toml" in refused(*asked, "--templates", "none.toml")


@pytest.mark.parametrize("command", ["export", "pairs"])
def test_work_directory_that_is_a_file(refused: Refused, model: str, tmp_path: Path, command: str) -> None:
    (tmp_path / "out.work").write_text("", encoding="utf-8")
    line = refused(command, model, "-q", "demo", "-o", "out")
    assert "choose another --work-dir" in line
