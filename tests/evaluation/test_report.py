from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile, LayerReport, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import OutputError
from alignez_gguf.evaluation.fluency import Fluency
from alignez_gguf.evaluation.judges.base import QueryAnswer, RatingJudge
from alignez_gguf.evaluation.judges.offline import OfflineRater
from alignez_gguf.evaluation.projections import Projections
from alignez_gguf.evaluation.queries import EvaluationQuery, overlap
from alignez_gguf.evaluation.report import json_path, write_report
from alignez_gguf.evaluation.results import ALIGNED, BASE, PERSONA, STEERED, System, judge_systems
from alignez_gguf.evaluation.run import Evaluation
from alignez_gguf.progress import SilentReporter
from alignez_gguf.storage.rows import ResultStore

N = 20
QUERIES = [EvaluationQuery(f"query {n}", harmful=n < 10) for n in range(N)]
REFUSAL, HELP = "I cannot help with that.", "First boil the water."
HOSTILE_TEXT = "<script>console.error('run')</script><img src=x onerror=alert(1)> & \u2028 {{ 7*7 }} \ud800"
FLUENT = Fluency(1.0, 0.0, clean_stop=True)


def system(name: str, n_refused: int, told: str = HELP) -> System:
    answers = [
        QueryAnswer(query.text, query.harmful, REFUSAL if n < n_refused else told, FLUENT)
        for n, query in enumerate(QUERIES)
    ]
    return System(name, f"the {name} model", tuple(answers))


def evaluation(
    tmp_path: Path,
    *,
    told: str = HELP,
    aligned_refusals: int = 8,
    persona_refusals: int | None = None,
    **parts: object,
) -> Evaluation:
    systems = [
        system(BASE, 4),
        system(STEERED, 8 if told == HELP else 0, told),
        *([] if persona_refusals is None else [system(PERSONA, persona_refusals)]),
        system(ALIGNED, aligned_refusals),
    ]
    control = ControlFile(
        ModelInfo(arch="llama", n_embd=4, n_layer=3),
        {1: LayerEdit(remove=np.eye(4)[0])},
        recipe={"query_hashes": ("0" * 16,)},
        layers=LayerReport(*(np.full(3, value, np.float32) for value in (0.9, 0.8, 0.1))),
        score={"tried.score": (1.0, 2.0), "tried.kl": (0.01, 0.2), "tried.candidate": ("a", "b")},
    )
    with ResultStore(tmp_path / "verdicts.jsonl") as store:
        judged = judge_systems(systems, RatingJudge(OfflineRater(2.0)), store, SilentReporter(), seed=0)
    made = {
        "queries": tuple(QUERIES),
        "overlap": overlap(control, QUERIES),
        "judged": tuple(judged),
        "judge": "offline rules",
        "control": control,
        "provenance": {"n_queries": N, "settings": {"seed": 0}},
        "projections": Projections(1, np.linspace(-1, 1, N), np.zeros(N)),
    }
    return Evaluation(**{**made, **parts})  # type: ignore[arg-type]


class Page(HTMLParser):
    """What a page holds: tags, their identifiers, the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.linked: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href"):
                self.linked.add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def written(found: Evaluation, tmp_path: Path) -> tuple[Page, dict[str, object]]:
    beside = write_report(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(page), json.loads(beside.read_text(encoding="utf-8"))


def test_page_shows_the_figures_that_the_json_holds(tmp_path: Path) -> None:
    page, found = written(evaluation(tmp_path), tmp_path)
    steered = found["systems"][1]["aspects"]["Safety"]  # type: ignore[index]
    assert (steered["win"], steered["lose"], steered["tie"], steered["judged"]) == (4, 0, 6, 10)
    assert steered["net_win_percent"]["value"] == 40.0
    assert steered["relative_improvement_percent"]["value"] == 100.0
    interval = f"[{steered['net_win_percent']['low']:+.1f}, {steered['net_win_percent']['high']:+.1f}]"
    assert f"+40.0 {interval} n = 10" in page.text
    refuses = found["systems"][1]["behaviour"]["refuses_harmful"]  # type: ignore[index]
    assert (refuses["value"], refuses["n"]) == (80.0, 10)


def test_every_cell_of_a_figure_says_how_many_queries_it_has(tmp_path: Path) -> None:
    write_report(evaluation(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = page[page.index('<table id="behaviour">') :]
    cells = re.findall(r"<td>(.*?)</td>", table[: table.index("</table>")])
    assert len(cells) == 5 * 9
    assert all("n = " in cell for cell in cells if cell[0].isdigit() or cell[0] in "+-\u2013")


def test_steered_is_compared_with_the_persona_in_pairs_in_page_and_json(tmp_path: Path) -> None:
    page, found = written(evaluation(tmp_path, persona_refusals=5), tmp_path)
    systems = {row["name"]: row for row in found["systems"]}  # type: ignore[attr-defined]
    against = systems["steered"]["aspects"]["Safety"]["against_persona"]
    assert (against["win"], against["lose"], against["tie"], against["judged"]) == (3, 0, 7, 10)
    net = against["net_win_percent"]
    assert net["value"] == 30.0
    assert net["low"] <= 30.0 <= net["high"]
    assert "Net Win against the persona, %" in page.text
    assert f"+30.0 [{net['low']:+.1f}, {net['high']:+.1f}] n = 10" in page.text
    assert systems["persona"]["aspects"]["Safety"]["against_persona"] is None
    assert found["rows"][5]["answers"]["steered"]["outcomes_against_persona"] == {  # type: ignore[index]
        "Safety": "win"
    }


def test_refusal_harm_and_fluency_are_told_apart_for_harmful_and_harmless_queries(tmp_path: Path) -> None:
    page, found = written(evaluation(tmp_path), tmp_path)
    behaviour = found["systems"][1]["behaviour"]  # type: ignore[index]
    figures = {name: (behaviour[name]["value"], behaviour[name]["n"]) for name in behaviour}
    assert figures["refuses_harmful"] == (80.0, 10)
    assert figures["harm_harmful"] == (20.0, 10)
    assert figures["over_refuses_harmless"] == figures["harm_harmless"] == (0.0, 10)
    assert figures["fluent_harmful"] == figures["fluent_harmless"] == (100.0, 10)
    assert behaviour["refuses_harmful"]["low"] < 80 < behaviour["refuses_harmful"]["high"]
    assert "Refusal, harm and fluency, apart" in page.text


def test_report_says_what_was_not_measured(tmp_path: Path) -> None:
    page, found = written(evaluation(tmp_path), tmp_path)
    (note,) = (note for note in found["notes"] if "on topic" in note)  # type: ignore[attr-defined]
    assert "not measured" in note
    assert note in page.text


def test_page_has_every_plot_and_needs_nothing_beside_it(tmp_path: Path) -> None:
    page, _ = written(evaluation(tmp_path), tmp_path)
    assert page.tags["svg"] == 4
    assert page.tags["script"] == page.tags["link"] - 1 == 0
    assert all(link.startswith(("#", "data:")) for link in page.linked)
    assert max(page.ids.values()) == 1


def test_undefined_relative_improvement_says_why(tmp_path: Path) -> None:
    page, _ = written(evaluation(tmp_path, aligned_refusals=2), tmp_path)
    assert "undefined: Net Win of the aligned model is -20.0%, not positive" in page.text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    page, found = written(evaluation(tmp_path, projections=None), tmp_path)
    assert found["projections"] is None
    assert "No projections" in page.text
    assert page.tags["svg"] == 3


def test_text_of_a_model_is_never_markup(tmp_path: Path) -> None:
    page, _ = written(evaluation(tmp_path, told=HOSTILE_TEXT), tmp_path)
    assert page.tags["script"] == page.tags["img"] == 0
    assert "<script>console.error('run')</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_report(evaluation(tmp_path / folder), tmp_path / folder / "report.html")
    for name in ("report.html", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_json_never_takes_the_place_of_the_page() -> None:
    assert json_path(Path("a/report.html")) == Path("a/report.json")
    with pytest.raises(OutputError, match=r"\.html"):
        json_path(Path("report.json"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_shows_the_page_without_a_console_message(tmp_path: Path) -> None:
    write_report(evaluation(tmp_path, told=HOSTILE_TEXT), tmp_path / "report.html")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    # A sign of life: what the console prints is seen here.
    canary = tmp_path / "canary.html"
    canary.write_text("<script>console.error('canary')</script>", encoding="utf-8")
    outputs = [
        subprocess.run(
            [str(CHROMIUM), *flags, profile, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=90,
            check=True,
        )
        for page in (canary, tmp_path / "report.html")
    ]
    assert "CONSOLE" in outputs[0].stderr
    assert "CONSOLE" not in outputs[1].stderr
    assert outputs[1].stdout.count("<svg") == 4
