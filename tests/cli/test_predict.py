from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignez_gguf.engines.base import Completion
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.pairs.filters import PairFilterReport
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.pipeline import Job
from alignez_gguf.runtime import bindings
from tests.cli.conftest import Run

QUICK = ("--max-tokens", "24", "--quick")


@pytest.fixture(autouse=True)
def few_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignez_gguf.predict import run

    defaults = run.predict.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "permutations", 20)


def predicted(run: Run, model: str, queries: str, *options: str) -> dict[str, Any]:
    result = run("predict", model, "-q", queries, "--quiet", "--json", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_verdict_is_one_line_below_the_table(run: Run, model: str, queries: str, tmp_path: Path) -> None:
    result = run("predict", model, "-q", queries, *QUICK)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].endswith("pairs are of use") or "left out" in lines[0]
    assert sum("layer" in line for line in lines) >= 5
    assert "length and first word" in result.stdout
    assert lines[-1].startswith("self-alignment is ")
    assert "telling answers apart" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_demo_model_is_told_apart_beyond_chance_and_its_edit_gains(run: Run, model: str) -> None:
    found = predicted(run, model, "demo", "--max-tokens", "24")
    own = found["own"]
    assert len(own["accuracy"]) == len(own["deviation"]) == 5
    assert own["best_accuracy"] == max(own["accuracy"]) == own["accuracy"][own["best"]]
    assert own["best_accuracy"] > 0.75
    assert own["p_chance"] <= 1 / 20
    assert own["surface"] == found["surface"]["best_accuracy"]
    assert found["held_out"]["edit"]
    figures = found["held_out"]["figures"]
    kinds = [
        [
            gain
            for gain, declined in zip(figures["gains"], figures["declined"], strict=True)
            if declined == kind
        ]
        for kind in (True, False)
    ]
    assert figures["gain"] == pytest.approx(np.mean([np.mean(kind) for kind in kinds]))
    assert figures["gain"] > 0.1
    assert 0 < figures["standard_error"] < figures["gain"]
    assert found["verdict"]["outlook"] in ("likely", "uncertain")
    assert found["pairs"]["total"] == 128
    assert found["embedder"] is None


def test_same_seed_gives_the_same_prediction(run: Run, model: str, queries: str) -> None:
    first = predicted(run, model, queries, *QUICK)
    assert first["held_out"] is None
    assert predicted(run, model, queries, *QUICK, "--parallel", "3") == first
    assert predicted(run, model, queries, *QUICK, "--seed", "1") != first


def test_gguf_embedder_gets_figures_of_its_own(run: Run, model: str, queries: str) -> None:
    found = predicted(run, model, queries, *QUICK, "--embedder", model)
    embedder = found["embedder"]
    assert len(embedder["accuracy"]) == 1
    assert embedder["surface"] == found["surface"]["best_accuracy"]
    assert embedder["accuracy"] != found["surface"]["accuracy"]


def test_limit_draws_queries_by_the_seed(run: Run, model: str, queries: str) -> None:
    found = predicted(run, model, queries, *QUICK, "--limit", "12")
    assert found["pairs"]["total"] == 12
    assert predicted(run, model, queries, *QUICK, "--limit", "12") == found


def test_work_directory_that_is_named_serves_a_second_run(
    run: Run, model: str, queries: str, tmp_path: Path
) -> None:
    first = predicted(run, model, queries, *QUICK, "--work-dir", "work")
    (store,) = (tmp_path / "work").glob("pairs-*.jsonl")
    written = store.stat().st_mtime_ns
    assert predicted(run, model, queries, *QUICK, "--work-dir", "work") == first
    assert store.stat().st_mtime_ns == written


def test_pair_that_a_bad_disk_changed_is_written_again(
    run: Run, model: str, queries: str, tmp_path: Path
) -> None:
    first = predicted(run, model, queries, *QUICK, "--work-dir", "work")
    (store,) = (tmp_path / "work").glob("pairs-*.jsonl")
    text = store.read_text(encoding="utf-8")
    store.write_text(text.replace('"helpful": "', '"helpful": "MARK ', 1), encoding="utf-8")
    again = run("predict", model, "-q", queries, "--json", *QUICK, "--work-dir", "work", "--quiet")
    assert json.loads(again.stdout) == first
    assert "MARK" not in store.read_text(encoding="utf-8")


@pytest.mark.parametrize("answer", ["A cake.", ""])
@pytest.mark.parametrize("quick", [("--quick",), ()])
def test_model_whose_answers_are_of_no_use_is_unlikely_to_align(
    run: Run, model: str, queries: str, monkeypatch: pytest.MonkeyPatch, answer: str, quick: tuple[str, ...]
) -> None:
    def same(
        _: object, requests: Sequence[object], *__: object, **___: object
    ) -> Iterator[tuple[int, Completion]]:
        yield from ((index, Completion(answer, 3, "stop")) for index in range(len(requests)))

    monkeypatch.setattr(LlamaEngine, "generate", same)
    found = predicted(run, model, queries, "--max-tokens", "8", *quick)
    assert (found["pairs"]["total"], found["pairs"]["kept"]) == (24, 0)
    assert found["verdict"]["outlook"] == "unlikely"


def test_quick_needs_no_patch_and_the_held_out_score_does(
    run: Run,
    refused: Callable[..., str],
    model: str,
    queries: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    assert "lacks the steering patch" in refused("predict", model, "-q", queries, "--max-tokens", "8")
    assert run("predict", model, "-q", queries, "--limit", "12", *QUICK).exit_code == 0


def test_model_that_ignores_its_personas_gets_a_negative_verdict_and_no_error(
    run: Run, model: str, queries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignez_gguf.predict import run as module

    def few(
        job: Job, generated: Sequence[PreferencePair], *_: Any
    ) -> tuple[list[PreferencePair], PairFilterReport]:
        return list(generated[:4]), PairFilterReport(len(generated), 4, persona_ignored=len(generated) - 4)

    monkeypatch.setattr(module, "usable_pairs", few)
    found = predicted(run, model, queries, "--max-tokens", "24")
    assert (found["own"], found["surface"], found["held_out"]) == (None, None, None)
    assert 0.5 < found["unfiltered"] <= 1
    assert found["verdict"]["outlook"] == "unlikely"
    shown = run("predict", model, "-q", queries, "--max-tokens", "24", "--quiet")
    assert shown.exit_code == 0
    assert "only 4 of 24 pairs follow their personas" in shown.stdout


def test_bad_input_is_refused_in_one_line(refused: Callable[..., str], model: str, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n".join(f"How do I bake {n} cakes?" for n in range(3)), encoding="utf-8")
    assert "give at least 10" in refused("predict", model, "-q", str(few), "--quiet", *QUICK)
    assert "cannot read" in refused("predict", "nowhere.gguf", "-q", str(few), *QUICK)
    missing = refused("predict", model, "-q", str(few), *QUICK, "--embedder", "nowhere.gguf")
    assert "cannot read the embedding model" in missing
    assert "--limit" in refused("predict", model, "-q", str(few), "--limit", "3", exit_code=2)
