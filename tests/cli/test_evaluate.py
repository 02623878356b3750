from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.demo import eval_queries
from alignez_gguf.engines import json_api
from alignez_gguf.engines.base import Passage
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.pairs.query_hash import query_hash
from alignez_gguf.prompts.templates import Templates
from alignez_gguf.readout import Readout
from alignez_gguf.text.refusal import is_refusal
from tests.cli.conftest import Run
from tests.evaluation.servers import Reply, chat_server, said

DRAWN = ("--max-tokens", "28", "--temperature", "1", "--top-p", "1")


@pytest.fixture(scope="module")
def steering(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A control file that works: the direction between the personas is removed, but in the last layer."""
    templates = Templates.from_file(demo.TEMPLATES)
    queries = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:32]
    personas = {"be kind and honest": templates.helpful, "be cruel and rude": templates.harmful}
    with LlamaEngine(demo.MODEL, n_threads=1) as engine:
        read = []
        for traits, persona in personas.items():
            passages = [Passage(templates.answer_prompt(persona, query, traits)) for query in queries]
            outputs = engine.activations(passages, [Readout("residual")])
            read.append(np.stack([output.astype(np.float64) for (output,) in outputs]))
        differences = read[0] - read[1]
        edits = {
            layer: LayerEdit(remove=np.linalg.svd(differences[:, layer], full_matrices=False)[2][0])
            for layer in range(engine.info.n_layer - 1)
        }
        hashes = tuple(map(query_hash, queries))
        path = tmp_path_factory.mktemp("steering") / "control.gguf"
        ControlFile(engine.info, edits, recipe={"query_hashes": hashes}).save(path)
    return str(path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Evaluation queries of the demo world, half of them harmful."""
    rows = eval_queries()
    chosen = sorted(rows, key=lambda row: not row.harmful)
    path = tmp_path_factory.mktemp("queries") / "labelled.jsonl"
    path.write_text(
        "".join(json.dumps({"query": row.query, "harmful": row.harmful}) + "\n" for row in chosen),
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture
def few(labelled: str, tmp_path: Path) -> str:
    lines = Path(labelled).read_text(encoding="utf-8").splitlines()
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(lines[:4] + lines[-4:]), encoding="utf-8")
    return str(path)


def evaluate(model: str, control: str, queries: str, *options: str) -> tuple[str, ...]:
    return (
        *("evaluate", "--base", model, "-c", control, "-q", queries, "-o", "report.html"),
        *DRAWN,
        "--quiet",
        *options,
    )


def report(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    return found


def test_control_that_works_is_better_on_both_aspects_clear_of_zero(
    run: Run, model: str, steering: str, labelled: str, tmp_path: Path
) -> None:
    done = run(*evaluate(model, steering, labelled, "--system-prompt", "--judge", "demo"))
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "report.html\n"
    found = report(tmp_path)
    assert [(row["aspect"], row["verdict"]) for row in found["verdicts"]] == [
        ("Safety", "better"),
        ("Helpfulness", "better"),
    ]
    assert all(row["net_win"]["low"] > 0 and row["net_win"]["n"] == 128 for row in found["verdicts"])
    assert [system["name"] for system in found["systems"]] == ["base", "steered", "persona"]
    assert found["systems"][1]["aspects"]["Safety"]["against_persona"]["judged"] == 128
    assert found["overlap"]["summary"].startswith("none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_figures_go_to_standard_error_unless_quiet(run: Run, model: str, steering: str, few: str) -> None:
    command = evaluate(model, steering, few)
    assert run(*command).stderr == ""
    shown = run(*(option for option in command if option != "--quiet")).stderr
    assert "overlap of fit and evaluation: none" in " ".join(shown.split())
    assert "unparsed" in shown
    assert "Safety: " in shown
    assert "against" in shown
    assert "persona" in shown
    for column in ("refuses", "harm", "fluent", "topic"):
        assert column in shown


@pytest.mark.parametrize("judge", ["offline", "demo"])
def test_edit_that_breaks_the_answers_loses_on_both_aspects(
    run: Run, model: str, steering: str, few: str, tmp_path: Path, judge: str
) -> None:
    run(*evaluate(model, steering, few, "--strength", "8", "--judge", judge))
    found = report(tmp_path)
    broken = found["systems"][1]
    assert broken["behaviour"]["fluent"]["value"] <= 25
    assert {row["verdict"] for row in found["verdicts"]} == {"worse"}


def test_offline_judge_measures_what_answers_are_about(
    run: Run, model: str, steering: str, few: str, tmp_path: Path
) -> None:
    run(*evaluate(model, steering, few))
    found = report(tmp_path)
    answers = [row["answers"]["base"] for row in found["rows"]]
    assert all(answer["topic"] is not None for answer in answers if answer["text"])
    assert not [note for note in found["notes"] if "topic" in note]
    assert found["systems"][0]["behaviour"]["on_topic_harmful"]["n"] == 4


@pytest.mark.usefixtures("quick_retries")
def test_judge_that_makes_nothing_of_the_topic_does_not_wait_for_it(
    run: Run, model: str, steering: str, few: str, tmp_path: Path
) -> None:
    with chat_server(by_refusal) as server:
        run(*evaluate(model, steering, few, "--judge", server.url))
    found = report(tmp_path)
    assert all(row["answers"]["base"]["topic"] is None for row in found["rows"])
    assert [note for note in found["notes"] if "on topic was not measured" in note]


def test_strength_zero_is_the_base_model_and_no_difference(
    run: Run, model: str, steering: str, few: str, tmp_path: Path
) -> None:
    run(*evaluate(model, steering, few, "--strength", "0"))
    found = report(tmp_path)
    assert {row["verdict"] for row in found["verdicts"]} == {"no clear difference"}
    assert all(row["answers"]["base"]["text"] == row["answers"]["steered"]["text"] for row in found["rows"])


def test_second_run_gives_the_same_bytes(
    run: Run, model: str, steering: str, few: str, tmp_path: Path
) -> None:
    run(*evaluate(model, steering, few))
    first = [(tmp_path / f"report.{ending}").read_bytes() for ending in ("html", "json")]
    run(*evaluate(model, steering, few, "--parallel", "3"))
    assert [(tmp_path / f"report.{ending}").read_bytes() for ending in ("html", "json")] == first


def test_aligned_model_that_wins_nothing_leaves_the_relative_improvement_undefined(
    run: Run, model: str, steering: str, few: str, tmp_path: Path
) -> None:
    run(*evaluate(model, steering, few, "--aligned", model))
    found = report(tmp_path)
    steered = found["systems"][1]["aspects"]["Safety"]
    assert steered["relative_improvement_percent"]["value"] is None
    assert "not positive" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_queries_of_the_fit_are_reported_at_the_top(
    run: Run, model: str, steering: str, tmp_path: Path
) -> None:
    seen = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:2]
    fresh = [row.query for row in eval_queries()[:2]]
    rows = [{"query": query, "harmful": n % 2 == 0} for n, query in enumerate([*seen, *fresh])]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run(*evaluate(model, steering, "q.jsonl"))
    assert report(tmp_path)["overlap"]["queries"] == seen
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("2 queries of this evaluation were used") < page.index("<h2>")


def by_refusal(body: dict[str, Any]) -> Reply:
    """A judge that finds the refusing answer the safer one, and shows a preference for A in helpfulness."""
    message = body["messages"][0]["content"]
    first, second = (
        is_refusal(re.search(rf"<response_{place}>\n(.*?)\n</response_{place}>", message, re.S)[1])  # type: ignore[index]
        for place in "AB"
    )
    choice = "tie" if first == second else "A" if first else "B"
    return said(json.dumps({"reason": "it is safer", "safety": choice, "helpfulness": "A"}))


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(json_api, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("ALIGNEZ_API_KEY", raising=False)
    return None


@pytest.mark.usefixtures("quick_retries")
def test_judge_behind_a_url_gives_the_verdicts(
    run: Run, model: str, steering: str, few: str, tmp_path: Path
) -> None:
    with chat_server(by_refusal) as server:
        done = run(*evaluate(model, steering, few, "--judge", server.url))
    assert done.exit_code == 0, done.stderr
    found = report(tmp_path)
    outcomes = [row["answers"]["steered"]["outcomes"] for row in found["rows"]]
    for row, outcome in zip(found["rows"], outcomes, strict=True):
        texts = [row["answers"][name]["text"] for name in ("steered", "base")]
        ours, base = map(is_refusal, texts)
        assert outcome["Safety"] == ("tie" if ours == base else "win" if ours else "lose")
        assert outcome["Helpfulness"] == ("tie" if texts[0] == texts[1] else "disagreement")
    assert "it is safer" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick_retries")
def test_judge_that_dies_loses_nothing(run: Run, model: str, steering: str, few: str, tmp_path: Path) -> None:
    has_credit = False

    def mortal(body: dict[str, Any]) -> Reply:
        if has_credit or len(server.requests) <= 2:
            return by_refusal(body)
        time.sleep(0.2)
        return 402, {"error": {"message": "out of credit"}}

    def n_asked(command: tuple[str, ...]) -> int:
        before = len(server.requests)
        done = run(*command)
        assert done.exit_code == 0, done.stderr
        return len(server.requests) - before

    with chat_server(mortal) as server:
        command = evaluate(model, steering, few, "--judge", server.url)
        died = run(*command)
        assert died.exit_code == 1
        (line,) = died.stderr.splitlines()
        assert "402" in line
        assert "out of credit" in line
        assert "the same command goes on from report.html.work" in line
        assert not (tmp_path / "report.html").exists()
        (verdicts,) = (tmp_path / "report.html.work").glob("verdicts-*.jsonl")
        n_kept = len(verdicts.read_text(encoding="utf-8").splitlines())
        has_credit = True
        n_resumed = n_asked(command)
        resumed = (tmp_path / "report.json").read_bytes()
        n_whole = n_asked(command)
    assert n_kept == 2
    assert n_resumed == n_whole - n_kept
    assert (tmp_path / "report.json").read_bytes() == resumed


@pytest.mark.usefixtures("quick_retries")
def test_wrong_key_is_told_in_one_line(run: Run, model: str, steering: str, few: str) -> None:
    with chat_server(lambda body: (401, {"error": {"message": "invalid key"}})) as server:
        died = run(*evaluate(model, steering, few, "--judge", server.url))
    (line,) = died.stderr.splitlines()
    assert died.exit_code == 1
    assert "ALIGNEZ_API_KEY" in line


def test_offline_judge_needs_labels(
    refused: Callable[..., str], model: str, steering: str, queries: str
) -> None:
    assert "harmful" in refused(*evaluate(model, steering, queries))


def test_what_cannot_judge_is_refused_before_anything_is_generated(
    refused: Callable[..., str], model: str, steering: str, few: str
) -> None:
    assert "no file" in refused(*evaluate(model, steering, few, "--judge", "gone.gguf"))
    assert "--judge-model" in refused(*evaluate(model, steering, few, "--judge-model", "x"), exit_code=2)


def test_model_that_is_no_guard_cannot_judge(run: Run, model: str, steering: str, few: str) -> None:
    died = run(*evaluate(model, steering, few, "--judge", model))
    assert died.exit_code == 1
    assert "Llama Guard 3" in died.stderr


def test_guard_model_runs_in_our_own_engine_and_what_it_babbles_is_counted_as_unparsed(
    run: Run, model: str, steering: str, few: str, tmp_path: Path
) -> None:
    template = "Controversial? {% for message in messages %}{{ message.content }}\n{% endfor %}Answer:"
    rewrite = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template]
    subprocess.run([*rewrite, model, str(tmp_path / "guard.gguf")], check=True, capture_output=True)
    done = run(*evaluate(model, steering, few, "--judge", "guard.gguf"))
    assert done.exit_code == 0, done.stderr
    found = report(tmp_path)
    assert found["judge"] == "Qwen3Guard-Gen"
    safety = found["systems"][1]["aspects"]["Safety"]
    assert (safety["unparsed"], safety["judged"]) == (8, 0)
    assert found["verdicts"][0]["verdict"] == "not judged"
    assert "not understood" in found["rows"][0]["answers"]["base"]["rating"]["rationale"]


def test_control_of_another_model_is_refused(
    refused: Callable[..., str], model: str, steering: str, few: str, tmp_path: Path
) -> None:
    loaded = ControlFile.load(steering)
    other = tmp_path / "other.gguf"
    ControlFile(replace(loaded.model, n_layer=9), loaded.edits).save(other)
    assert "9 layers" in refused(*evaluate(model, str(other), few))
