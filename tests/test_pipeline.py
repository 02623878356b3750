"""The main job on the demo model, from queries to a control file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alignez_gguf import __version__, demo, pipeline
from alignez_gguf.control import ControlFile
from alignez_gguf.edits import LayerEdit
from alignez_gguf.engines.llama import LlamaEngine
from alignez_gguf.errors import NoGainError, QueryError
from alignez_gguf.generation import answer_prompts, answered_prompts
from alignez_gguf.pairs import PreferencePair, load_pairs
from alignez_gguf.pipeline import Export, Settings, export, read_activations, self_generated_pairs
from alignez_gguf.progress import SilentReporter
from alignez_gguf.prompts import METADATA_KEY, Templates
from alignez_gguf.selection import Divergence, span
from alignez_gguf.workdir import WorkDirectory

N_QUERIES = 24
QUERIES = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:N_QUERIES]
SETTINGS = Settings(max_tokens=24)
QUICK = replace(SETTINGS, method="svd-diff", reading="prompt")
"""A search among a few candidates, without the training of probes."""


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(demo.MODEL, n_threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def templates(engine: LlamaEngine) -> Templates:
    return Templates.from_toml(engine.model.metadata(METADATA_KEY) or "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of all tests that don't need a fresh one."""
    return tmp_path_factory.mktemp("work")


def run(
    engine: LlamaEngine, templates: Templates, settings: Settings, folder: Path, n: int = N_QUERIES
) -> Export:
    with WorkDirectory(folder) as work:
        return export(engine, QUERIES[:n], templates, settings, work, SilentReporter())


@pytest.fixture(scope="module")
def paper(engine: LlamaEngine, templates: Templates, folder: Path) -> Export:
    return run(engine, templates, replace(SETTINGS, recipe="paper", seed=3), folder)


@pytest.fixture(scope="module")
def auto(engine: LlamaEngine, templates: Templates, folder: Path) -> Export:
    return run(engine, templates, SETTINGS, folder)


def reloaded(made: Export, tmp_path: Path) -> ControlFile:
    made.control.save(tmp_path / "control.gguf")
    return ControlFile.load(tmp_path / "control.gguf")


def test_paper_recipe_is_ccs_on_responses_with_the_decision_rule(
    paper: Export, engine: LlamaEngine, tmp_path: Path
) -> None:
    control = reloaded(paper, tmp_path)
    assert dict(control.recipe) == {
        "name": "paper",
        "method": "ccs",
        "reading": "response",
        "rank": 1,
        "threshold": 0.5,
        "seed": 3,
        "template_version": "demo-1",
        "package_version": __version__,
        "pairs.total": N_QUERIES,
        "pairs.kept": paper.filtered.kept,
        "pairs.fit": paper.filtered.kept,
    }
    assert dict(control.score) == {}
    assert paper.selection is None
    report = control.layers
    assert report is not None
    assert report.loss is not None
    for layer in range(engine.info.n_layer):
        p_helpful, p_harmful = report.p_helpful[layer], report.p_harmful[layer]
        decision = "none"
        if p_harmful > p_helpful and p_harmful >= 0.5:
            decision = "remove"
        elif p_harmful <= p_helpful and p_helpful >= 0.5:
            decision = "add"
        assert control.edits.get(layer, LayerEdit()).decision == decision
        assert control.edits.get(layer, LayerEdit()).rank == (decision == "remove")


def test_paper_recipe_that_is_sure_of_no_layer_is_an_error(
    engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    settings = replace(SETTINGS, recipe="paper", method="mean", threshold=1.5)
    with pytest.raises(NoGainError, match=r"threshold 1\.5.*lower --threshold"):
        run(engine, templates, settings, folder)


def test_auto_writes_every_figure_that_led_to_the_choice(auto: Export, tmp_path: Path) -> None:
    control, selection = reloaded(auto, tmp_path), auto.selection
    assert selection is not None
    tried = selection.tried
    chosen = tried.index(selection.chosen)
    divergences = [scored.divergence or Divergence(-1.0, -1.0) for scored in tried]
    assert dict(control.score) == {
        "score": selection.chosen.gain,
        "standard_error": selection.chosen.standard_error,
        "leak": selection.chosen.leak,
        "kl": selection.chosen.kl,
        "kl_after_first": divergences[chosen].after_first,
        "kl_budget": 0.1,
        "queries": selection.n_queries,
        "tried.candidate": tuple(str(scored.candidate) for scored in tried),
        "tried.layers": tuple(span(scored.candidate.layers) for scored in tried),
        "tried.score": tuple(scored.gain for scored in tried),
        "tried.leak": tuple(scored.leak for scored in tried),
        "tried.kl": tuple(divergence.per_token for divergence in divergences),
        "tried.kl_after_first": tuple(divergence.after_first for divergence in divergences),
    }
    assert 0 <= float(str(control.score["kl"])) <= 0.1
    assert {scored.candidate.source.method for scored in tried} == {"ccs", "mean", "svd-diff"}
    assert {scored.candidate.source.reading for scored in tried} == {"prompt", "response"}


def test_auto_writes_the_edits_of_its_choice(auto: Export, tmp_path: Path) -> None:
    control = reloaded(auto, tmp_path)
    assert auto.selection is not None
    chosen = auto.selection.chosen.candidate
    assert tuple(control.edits) == chosen.layers
    assert {edit.decision for edit in control.edits.values()} == {chosen.operation}
    if chosen.operation != "add":
        assert {edit.rank for edit in control.edits.values()} == {chosen.source.rank}
    recipe = control.recipe
    assert (recipe["method"], recipe["reading"], recipe["rank"], recipe["operation"], recipe["amount"]) == (
        chosen.source.method,
        chosen.source.reading,
        chosen.source.rank,
        chosen.operation,
        chosen.amount,
    )
    assert recipe["name"] == "auto"
    assert int(str(recipe["pairs.fit"])) + int(str(recipe["pairs.selection"])) == recipe["pairs.kept"]


def test_gain_in_the_file_is_what_the_steered_engine_shows(
    auto: Export, engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    """Two ways to the same figure: the shared cache of the selection, and the engine that users run."""
    with WorkDirectory(folder) as work:
        pairs = self_generated_pairs(engine, QUERIES, templates, SETTINGS, work, SilentReporter())
    _, chosen_on = pipeline._split(len(pairs), SETTINGS.seed)

    def logprobs(prompts: list[str], strength: float = 0.0) -> NDArray[np.float64]:
        return np.stack(list(engine.next_token_logprobs(prompts, strength))).astype(np.float64)

    plain = [templates.plain_prompt(pairs[index].query) for index in chosen_on]
    asked = [answer_prompts(templates, pairs[index]) for index in chosen_on]
    helpful = np.exp(logprobs([prompts[0] for prompts in asked]))
    harmful = np.exp(logprobs([prompts[1] for prompts in asked]))
    base = logprobs(plain)
    engine.set_edits(auto.control.edits)
    steered = logprobs(plain, strength=1.0)
    engine.set_edits({})

    gain = ((helpful - harmful) * (steered - base)).sum(axis=1).mean()
    # Keys and values in F16 are added up in another order here.
    assert auto.control.score["score"] == pytest.approx(gain, rel=0.02)


def test_nothing_within_the_budget_is_an_error(
    engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    with pytest.raises(NoGainError, match="nothing makes this model safer"):
        run(engine, templates, replace(QUICK, kl_budget=1e-9), folder)


def test_too_few_pairs_are_an_error(engine: LlamaEngine, templates: Templates, folder: Path) -> None:
    with pytest.raises(QueryError, match=r"10 usable pairs are too few .* at least 16 queries"):
        run(engine, templates, QUICK, folder, n=10)


def test_sixteen_usable_pairs_are_enough(engine: LlamaEngine, templates: Templates, folder: Path) -> None:
    try:
        made = run(engine, templates, QUICK, folder, n=16)
    except NoGainError:
        return  # so few queries need not make anything certain
    assert (made.control.recipe["pairs.fit"], made.control.recipe["pairs.selection"]) == (8, 8)


@pytest.mark.parametrize("n_pairs", [16, 17, 24, 120, 500])
def test_pairs_are_split_into_two_parts_of_some_size(n_pairs: int) -> None:
    fit, selection = pipeline._split(n_pairs, seed=0)
    assert sorted([*fit, *selection]) == list(range(n_pairs))
    assert 8 <= len(selection) <= 64
    assert len(fit) >= 8
    assert not np.array_equal(selection, pipeline._split(n_pairs, seed=1)[1])


def test_only_the_layers_asked_for_are_edited(
    engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    made = run(engine, templates, replace(QUICK, layers=(1, 2), kl_budget=10.0), folder)
    assert made.selection is not None
    assert set(made.control.edits) <= {1, 2}
    paper = replace(SETTINGS, recipe="paper", method="mean", layers=(0,))
    assert set(run(engine, templates, paper, folder).control.edits) == {0}


def test_activations_are_read_at_the_last_token_of_each_text(
    engine: LlamaEngine, templates: Templates, folder: Path
) -> None:
    pairs = [PreferencePair("How do I bake?", "With care.", "Go away.", "be kind", "be rude")]
    for reading, texts_of in (("prompt", answer_prompts), ("response", answered_prompts)):
        with WorkDirectory(folder) as work:
            found = read_activations(engine, pairs, reading, templates, work, SilentReporter())  # type: ignore[arg-type]
        helpful, harmful = engine.mlp_outputs(list(texts_of(templates, pairs[0])))
        np.testing.assert_array_equal(found.helpful[:, 0], helpful)
        np.testing.assert_array_equal(found.harmful[:, 0], harmful)


class Interrupting:
    """An engine that is interrupted after some texts have been read."""

    def __init__(self, engine: LlamaEngine, after: int) -> None:
        self._engine = engine
        self._after = after
        self.n_read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def mlp_outputs(self, texts: list[str]) -> Iterator[NDArray[np.float16]]:
        for output in self._engine.mlp_outputs(texts):
            if self.n_read == self._after:
                raise KeyboardInterrupt
            self.n_read += 1
            yield output


def test_reading_that_was_interrupted_goes_on_with_the_missing_pairs(
    engine: LlamaEngine, templates: Templates, folder: Path, tmp_path: Path
) -> None:
    with WorkDirectory(folder) as work:
        pairs = self_generated_pairs(engine, QUERIES, templates, SETTINGS, work, SilentReporter())
        whole = read_activations(engine, pairs, "response", templates, work, SilentReporter())
    with WorkDirectory(tmp_path) as work:
        stopped = Interrupting(engine, after=11)
        with pytest.raises(KeyboardInterrupt):
            read_activations(stopped, pairs, "response", templates, work, SilentReporter())  # type: ignore[arg-type]
        rest = Interrupting(engine, after=-1)
        found = read_activations(rest, pairs, "response", templates, work, SilentReporter())  # type: ignore[arg-type]
    assert rest.n_read == 2 * (len(pairs) - 5)
    np.testing.assert_array_equal(found.helpful, whole.helpful)
    np.testing.assert_array_equal(found.harmful, whole.harmful)


def export_command(queries: Path, output: Path, *arguments: str) -> list[str]:
    options = ["--max-tokens", "24", "--threads", "1", "--method", "svd-diff", "--read", "prompt", *arguments]
    return ["export", str(demo.MODEL), "-q", str(queries), "-o", str(output), *options]


def in_process_of_its_own(command: list[str], before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}\nfrom alignez_gguf.cli import main\nmain({command!r}, prog_name='alignez-gguf')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def dying_at_the_tenth_pair(signal: str) -> str:
    """Code that makes a process send a signal to itself when a line of the pairs is half written."""
    return f"""
import os, signal
from alignez_gguf import generation, pairs
generation._CHUNK = 4
append = pairs.PairStore.append
def append_and_die(store, pair):
    append(store, pair)
    if len(store) == 10:
        store._file.write(b'{{"query": "half a li')
        store._file.flush()
        os.kill(os.getpid(), signal.{signal})
pairs.PairStore.append = append_and_die
"""


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.txt"
    path.write_text("\n".join(QUERIES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, queries: Path) -> Path:
    """The control file of a run from start to end."""
    path = tmp_path_factory.mktemp("uninterrupted") / "control.gguf"
    done = in_process_of_its_own(export_command(queries, path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path}\n"
    (chosen,) = [line for line in done.stderr.splitlines() if "->" in line]
    assert f"{ControlFile.load(path).score['score']:+.3f}" in chosen
    assert [file.name for file in path.parent.iterdir()] == ["control.gguf"]
    return path


def test_same_command_gives_the_same_bytes(uninterrupted: Path, queries: Path, tmp_path: Path) -> None:
    path, work = tmp_path / "again.gguf", tmp_path / "work"
    # The number of texts at once is no part of the result.
    command = export_command(queries, path, "--work-dir", str(work), "--quiet", "--parallel", "5")
    done = in_process_of_its_own(command)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert len(list(work.glob("pairs-*.jsonl"))) == 1


def test_run_that_was_killed_goes_on_to_the_same_bytes(
    uninterrupted: Path, queries: Path, tmp_path: Path
) -> None:
    path = tmp_path / "control.gguf"
    killed = in_process_of_its_own(export_command(queries, path), before=dying_at_the_tenth_pair("SIGKILL"))
    assert killed.returncode == -9
    assert not path.exists()
    (pairs,) = (tmp_path / "control.gguf.work").glob("pairs-*.jsonl")
    before = pairs.read_bytes()
    assert before.endswith(b'{"query": "half a li')

    resumed = in_process_of_its_own(export_command(queries, path))

    assert resumed.returncode == 0, resumed.stderr
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["control.gguf"]


def test_interrupt_says_how_to_go_on(queries: Path, tmp_path: Path) -> None:
    path = tmp_path / "control.gguf"
    command = export_command(queries, path, "--quiet")
    stopped = in_process_of_its_own(command, before=dying_at_the_tenth_pair("SIGINT"))
    assert stopped.returncode == 1
    assert stopped.stderr == f"Error: stopped; the same command goes on from {path}.work\n"
    assert [file.name for file in tmp_path.iterdir()] == ["control.gguf.work"]


def test_pairs_that_are_done_are_not_asked_for_again(
    engine: LlamaEngine, templates: Templates, tmp_path: Path
) -> None:
    with WorkDirectory(tmp_path) as work:
        first = self_generated_pairs(engine, QUERIES[:4], templates, SETTINGS, work, SilentReporter())
        (path,) = tmp_path.glob("pairs-*.jsonl")
        marked = replace(first[2], helpful="marked")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows[2]["helpful"] = "marked"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        again = self_generated_pairs(engine, QUERIES[:6], templates, SETTINGS, work, SilentReporter())
    assert again[:4] == [first[0], first[1], marked, first[3]]
    assert load_pairs(path) == again


def test_no_gain_exits_with_1_and_writes_no_file(queries: Path, tmp_path: Path) -> None:
    path = tmp_path / "control.gguf"
    done = in_process_of_its_own(export_command(queries, path, "--kl-budget", "1e-9", "--quiet"))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: nothing makes this model safer")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not path.exists()


def test_second_process_in_a_work_directory_is_refused(queries: Path, tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "work"):
        command = export_command(queries, tmp_path / "c.gguf", "--work-dir", str(tmp_path / "work"))
        done = in_process_of_its_own(command)
    assert done.returncode == 1
    assert "another process is at work" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
