"""`export` as users call it: its options, and what is left when it is killed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.engines.base import Completion
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.storage.workdir import WorkDirectory
from tests.cli.conftest import Run, write_queries

Refused = Callable[..., str]

QUICK = (
    *("--max-tokens", "24", "--method", "mean", "--read", "prompt", "--hook", "mlp"),
    *("--scope", "generation", "--kl-budget", "1"),
)


@pytest.fixture(scope="session")
def queries(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Enough queries of the demo world to fit, to choose and to confirm on."""
    return write_queries(tmp_path_factory.mktemp("queries"), 48)


def command(queries: str, output: Path, *arguments: str) -> list[str]:
    options = ["-q", queries, "-o", str(output), "--threads", "1", *QUICK, *arguments]
    return ["export", str(demo.MODEL), *options]


def in_process_of_its_own(command: list[str], before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}\nfrom alignez_gguf.cli import main\nmain({command!r}, prog_name='alignez-gguf')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, queries: str) -> Path:
    """The control file of a run from start to end; its work directory lies beside it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    path = folder / "control.gguf"
    done = in_process_of_its_own(command(queries, path, "--work-dir", str(folder / "work")))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}\n"
    assert "-> " in done.stderr
    score = ControlFile.load(path).score
    assert f"{score['choice.score']:+.3f}" in done.stderr
    assert f"gains {score['score']:.2f}" in " ".join(done.stderr.split())
    for name in ("no edit", "safety-first persona", "random", "confirmed on"):
        assert name in done.stderr
    return path


def test_same_command_gives_the_same_bytes_and_leaves_nothing_else(
    uninterrupted: Path, queries: str, tmp_path: Path
) -> None:
    path = tmp_path / "again.gguf"
    # The number of texts at once is no part of the result.
    done = in_process_of_its_own(command(queries, path, "--quiet", "--parallel", "5"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


KILL_AT = """
import os, signal, sys
events = 0
def count(event, arguments):
    global events
    writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax+"
    if ({work!r} in str(arguments[:1])) and (writes or event in ("os.rename", "os.mkdir", "os.truncate")):
        events += 1
        if events == {last}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
"""
"""Kills the process just before it changes something in its work directory for the n-th time."""


def test_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    uninterrupted: Path, queries: str, tmp_path: Path
) -> None:
    path = tmp_path / "control.gguf"
    random = np.random.default_rng(0)
    for low, high in ((1, 6), (2, 12), (4, 30), (10, 40), (20, 60)):
        last = int(random.integers(low, high))
        killed = in_process_of_its_own(
            command(queries, path), before=KILL_AT.format(work=f"{path}.work", last=last)
        )
        assert killed.returncode == -signal.SIGKILL, (last, killed.stderr)
        assert not path.exists()
    resumed = in_process_of_its_own(command(queries, path))
    assert resumed.returncode == 0, resumed.stderr
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def dying_in_the_tenth_pair(name: str) -> str:
    """Code that makes a process send a signal to itself when a line of the pairs is half written."""
    return f"""
import os, signal
from alignez_gguf.pairs import generation, pairs
generation._CHUNK = 4
append = pairs.PairStore.append
def append_and_die(store, pair):
    append(store, pair)
    if len(store) == 10:
        store._journal._file.write(b'{{"query": "half a li')
        os.kill(os.getpid(), signal.{name})
pairs.PairStore.append = append_and_die
"""


def test_run_that_was_killed_within_a_line_goes_on_to_the_same_bytes(
    uninterrupted: Path, queries: str, tmp_path: Path
) -> None:
    path = tmp_path / "control.gguf"
    killed = in_process_of_its_own(command(queries, path), before=dying_in_the_tenth_pair("SIGKILL"))
    assert killed.returncode == -signal.SIGKILL
    (pairs,) = (tmp_path / "control.gguf.work").glob("pairs-*.jsonl")
    assert pairs.read_bytes().endswith(b'{"query": "half a li')
    resumed = in_process_of_its_own(command(queries, path))
    assert resumed.returncode == 0, resumed.stderr
    assert path.read_bytes() == uninterrupted.read_bytes()


def test_interrupt_says_how_to_go_on(queries: str, tmp_path: Path) -> None:
    path = tmp_path / "control.gguf"
    stopped = in_process_of_its_own(
        command(queries, path, "--quiet"), before=dying_in_the_tenth_pair("SIGINT")
    )
    assert stopped.returncode == 1
    assert stopped.stderr == f"Error: stopped; the same command goes on from {path}.work\n"
    assert [file.name for file in tmp_path.iterdir()] == ["control.gguf.work"]


def test_second_process_in_a_work_directory_is_refused(queries: str, tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "work"):
        done = in_process_of_its_own(
            command(queries, tmp_path / "c.gguf", "--work-dir", str(tmp_path / "work"))
        )
    assert done.returncode == 1
    assert "another process is at work" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_row_is_chosen_from_what_the_work_directory_holds(
    uninterrupted: Path, run: Run, queries: str, tmp_path: Path
) -> None:
    work = uninterrupted.parent / "work"
    best = ControlFile.load(uninterrupted)
    before = contents(work)
    asked = command(queries, tmp_path / "row.gguf", "--work-dir", str(work), "--choose", "1")
    first = run(*asked)
    after = contents(work)
    assert {path: after[path] for path in before} == before
    if first.exit_code == 1:  # the gentlest edit may gain too little to be sure of
        assert "not confirmed" in first.stderr
        return
    assert first.exit_code == 0, first.stderr
    assert "-> 1" in first.stderr
    chosen = ControlFile.load(tmp_path / "row.gguf")
    assert float(str(chosen.score["choice.kl"])) <= float(str(best.score["choice.kl"]))
    assert chosen.score["tried.candidate"] == best.score["tried.candidate"]
    assert chosen.score["tried.kl"] == best.score["tried.kl"]


def test_choosing_needs_the_work_directory_of_one_table(refused: Refused, model: str) -> None:
    asked = ("export", model, "-q", "demo", "-o", "out.gguf", "--choose", "2")
    assert "give the --work-dir of that run" in refused(*asked, exit_code=2)
    several = ("--work-dir", "w", "--aspect", "safety", "--aspect", "helpfulness")
    assert "one aspect at a time" in refused(*asked, *several, exit_code=2)


def test_no_gain_exits_with_1_and_writes_no_file(run: Run, model: str, queries: str, tmp_path: Path) -> None:
    quick = [*QUICK[:-1], "1e-9"]
    result = run("export", model, "-q", queries, "-o", "control.gguf", *quick, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: nothing brings this model nearer to the safety-first persona")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "control.gguf").exists()


@pytest.fixture
def preferences(queries: str, tmp_path: Path) -> Path:
    """Pairs as data sets for preference optimisation have them."""
    asked = Path(queries).read_text(encoding="utf-8").splitlines()
    rows = [
        {"prompt": query, "chosen": f"I would rather not, thank you, {n}.", "rejected": f"Sure, fool, {n}."}
        for n, query in enumerate(asked)
    ]
    path = tmp_path / "dpo.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_pairs_of_a_file_stand_in_for_queries(
    run: Run, model: str, preferences: Path, tmp_path: Path
) -> None:
    options = ("--recipe", "paper", "--method", "mean", "--max-tokens", "24", "--work-dir", "work")
    given = tmp_path / "given.jsonl"
    lines = preferences.read_text(encoding="utf-8").splitlines(keepends=True)
    given.write_text("".join(lines[:16]), encoding="utf-8")
    result = run("export", model, "--pairs", str(given), "-o", "given.gguf", *options)
    assert result.exit_code == 0, result.stderr
    recipe = ControlFile.load(tmp_path / "given.gguf").recipe
    assert (recipe["pairs.given"], recipe["pairs.total"], recipe["pairs.kept"]) == (16, 16, 16)
    assert "16 of 16 pairs are of use" in result.stderr
    assert "generating pairs" not in result.stderr
    assert not list((tmp_path / "work").glob("pairs-*"))


def test_mixed_pairs_count_as_often_as_they_are_told_to(
    run: Run, model: str, few_queries: str, preferences: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    lines = preferences.read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(lines[:6]), encoding="utf-8")
    options = ("--recipe", "paper", "--method", "mean", "--max-tokens", "24", "--work-dir", "work", "--quiet")

    def made(*mix: str) -> ControlFile:
        result = run(
            "export", model, "-q", few_queries, "--pairs", str(few), *mix, "-o", "mixed.gguf", *options
        )
        assert result.exit_code == 0, result.stderr
        return ControlFile.load(tmp_path / "mixed.gguf")

    once, often = made("--mix", "1"), made("--mix", "50")
    assert once.recipe["pairs.given"] == often.recipe["pairs.given"] == 6
    assert once.recipe["pairs.total"] == 22
    # Fitted anew, but what the model said and read was there.
    assert len(list((tmp_path / "work").glob("directions-*.npz"))) == 2
    # At the answers, and in both outputs at the prompts: the other recipe will ask for them.
    assert len(list((tmp_path / "work").glob("activations-*"))) == 3
    assert len(list((tmp_path / "work").glob("pairs-*"))) == 1


USELESS = {
    "identical": (
        {"chosen": "A cake.", "rejected": "A cake."},
        "0 of 4 pairs are of use (left out: 4 identical)",
    ),
    "empty": ({"chosen": "A cake.", "rejected": " "}, "0 of 4 pairs are of use (left out: 4 empty)"),
}


@pytest.mark.parametrize("recipe", ["paper", "auto", "score"])
@pytest.mark.parametrize("fault", USELESS)
def test_pairs_of_no_use_are_refused_with_the_reason(
    run: Run, model: str, control: str, tmp_path: Path, recipe: str, fault: str
) -> None:
    answers, message = USELESS[fault]
    rows = [{"prompt": f"What is {n}?", **answers} for n in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ("--score-only", control) if recipe == "score" else ("-o", "out", "--recipe", recipe)
    result = run("export", model, "--pairs", "p.jsonl", "--max-tokens", "4", "--quiet", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    mend = "give pairs whose two answers differ, or queries that the personas answer differently"
    assert result.stderr == f"Error: {message}; {mend}\n"


@pytest.mark.parametrize("recipe", ["paper", "auto"])
def test_generated_pairs_of_no_use_are_refused_with_the_reason(
    run: Run, model: str, queries: str, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    def same(
        _: object, requests: Sequence[object], *__: object, **___: object
    ) -> Iterator[tuple[int, Completion]]:
        yield from ((index, Completion("A cake.", 3, "stop")) for index in range(len(requests)))

    monkeypatch.setattr(LlamaEngine, "generate", same)
    result = run("export", model, "-q", queries, "-o", "out", "--recipe", recipe, "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: 0 of 48 pairs are of use (left out: 48 identical); give")


def test_file_of_pairs_without_any_is_named(refused: Refused, model: str, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    line = refused("export", model, "--pairs", "none.jsonl", "--mix", "2", "-q", "demo", "-o", "out")
    assert "none.jsonl holds no pairs" in line


def test_mix_alone_and_missing_queries_are_bad_usage(refused: Refused, model: str, preferences: Path) -> None:
    assert "give them with --pairs" in refused(
        "export", model, "-q", "demo", "-o", "out", "--mix", "2", exit_code=2
    )
    for arguments in ((), ("--pairs", str(preferences), "--mix", "2")):
        assert "--queries" in refused("export", model, "-o", "out", *arguments, exit_code=2)
    assert "--output" in refused("export", model, "-q", "demo", exit_code=2)


def test_several_aspects_show_their_trade_off(run: Run, model: str, queries: str, tmp_path: Path) -> None:
    own = demo.TEMPLATES.read_text(encoding="utf-8")
    personas = own[own.index("[helpful]") :]
    renamed = personas.replace("[helpful]", "[aspects.order.helpful]").replace(
        "[harmful]", "[aspects.order.harmful]"
    )
    (tmp_path / "two.toml").write_text(f"{own}\n{renamed}", encoding="utf-8")
    quick = [*QUICK[:-1], "5"]
    aspects = ("--aspect", "safety", "--aspect", "order=0.5", "--templates", "two.toml")
    result = run("export", model, "-q", queries, "-o", "both.gguf", *quick, *aspects)
    assert result.exit_code == 0, result.stderr
    assert "aspect: safety" in result.stderr
    assert "gain together" in result.stderr
    control = ControlFile.load(tmp_path / "both.gguf")
    assert control.recipe["aspects"] == control.score["aspects.name"] == ("safety", "order")
    for edit in control.edits.values():
        if edit.remove is not None:
            np.testing.assert_allclose(edit.remove @ edit.remove.T, np.eye(edit.rank), atol=1e-5)
    scored = run("export", model, "-q", queries, "--score-only", "both.gguf", *quick, *aspects, "--quiet")
    first, second = scored.stdout.splitlines()
    assert first.startswith("safety: gain ")
    assert second.startswith("order: gain ")


@pytest.mark.parametrize(
    ("aspect", "message"),
    [
        ("safety=none", "write NAME or NAME=WEIGHT"),
        ("safety=0", "must be a number above 0"),
        ("safety=-1", "must be a number above 0"),
        ("safety=nan", "must be a number above 0"),
        ("safety=inf", "must be a number above 0"),
    ],
)
def test_bad_aspects_are_bad_usage(refused: Refused, model: str, aspect: str, message: str) -> None:
    asked = ("export", model, "-q", "demo", "-o", "out")
    assert message in refused(*asked, "--aspect", aspect, exit_code=2)
    assert "named twice" in refused(*asked, "--aspect", "safety", "--aspect", "safety=2", exit_code=2)


def test_unknown_aspect_is_refused_with_those_there_are(refused: Refused, model: str) -> None:
    line = refused("export", model, "-q", "demo", "-o", "out", "--aspect", "speed")
    assert "no aspect 'speed'; they have safety" in line


def test_file_is_scored_as_the_export_scored_it(
    uninterrupted: Path, run: Run, model: str, queries: str, tmp_path: Path
) -> None:
    result = run("export", model, "-q", queries, "--score-only", str(uninterrupted), *QUICK, "--quiet")
    assert result.exit_code == 0, result.stderr
    score = ControlFile.load(uninterrupted).score
    found = re.fullmatch(
        r"gain (\S+) \+- (\S+) nat an answer, KL (\S+) nat/token over (\d+) queries\n", result.stdout
    )
    assert found is not None
    assert int(found[4]) == int(str(score["queries"])) + int(str(score["choice.queries"]))
    low, high = sorted(float(str(score[name])) for name in ("score", "choice.score"))
    assert low - 0.01 <= float(found[1]) <= high + 0.01
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_file_for_another_model_is_not_scored(
    refused: Refused, uninterrupted: Path, model: str, tmp_path: Path
) -> None:
    (tmp_path / "text.gguf").write_text("no control file", encoding="utf-8")
    line = refused("export", model, "-q", "demo", "--score-only", "text.gguf", "--work-dir", "w", "--quiet")
    assert "text.gguf is not a usable control file" in line


@pytest.mark.parametrize(
    ("form", "names"),
    [("stock", {"safe.lora.gguf", "safe.cvec.gguf"}), ("glp", {"safe"}), ("native", {"safe"})],
)
def test_other_forms_are_written_for_the_model(
    run: Run, model: str, few_queries: str, tmp_path: Path, form: str, names: set[str]
) -> None:
    quick = ("--recipe", "paper", "--method", "mean", "--layers", "1-", "--max-tokens", "12")
    result = run("export", model, "-q", few_queries, "-o", "safe", "--format", form, *quick, "--quiet")
    if form == "glp" and result.exit_code == 1:
        assert result.stderr.count("\n") == 1  # the format cannot carry every edit, and says so
        return
    assert result.exit_code == 0, result.stderr
    written = set(result.stdout.split())
    assert written <= names
    assert written == {path.name for path in tmp_path.iterdir()}


def test_stock_form_adds_behind_a_norm_that_follows_the_mlp(
    run: Run, model: str, few_queries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelInfo, "has_post_norm", True)
    quick = ("--recipe", "paper", "--method", "mean", "--layers", "1-", "--max-tokens", "12")
    result = run("export", model, "-q", few_queries, "-o", "safe", "--format", "stock", *quick)
    assert result.exit_code == 0, result.stderr
    assert "--hook residual: stock llama.cpp cannot add before the norm" in " ".join(result.stderr.split())
    assert "safe.cvec.gguf" in {path.name for path in tmp_path.iterdir()}


def test_transformers_model_needs_no_patched_runtime_and_no_gguf(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignez_gguf.runtime import bindings

    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    bindings._functions.cache_clear()
    (tmp_path / "empty").mkdir()
    line = refused("export", "empty", "-q", "demo", "-o", "out")
    assert "runtime build" not in line
    assert "empty" in line


def test_name_of_a_folder_stays_what_was_typed(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path, ./org/name would become org/name: another model, on the hub."""
    import alignez_gguf.engines.transformers.engine as engines

    asked: list[object] = []

    def refuse(source: object, **_: object) -> None:
        asked.append(source)
        from alignez_gguf.errors import ModelFileError

        raise ModelFileError("no such model")

    monkeypatch.setattr(engines, "TransformersEngine", refuse)
    for name in ("./org/name", "org/name"):
        refused("export", name, "-q", "demo", "-o", "out")
    assert asked == ["./org/name", "org/name"]
