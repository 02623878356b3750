"""`alignez-gguf evaluate`: does a control file work?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignez_gguf.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.evaluation.fluency import FluencyRule
    from alignez_gguf.evaluation.judges.base import Judge
    from alignez_gguf.evaluation.run import Evaluation, OpenEngine
    from alignez_gguf.prompts.chat_template import FramingChoice
    from alignez_gguf.prompts.templates import Templates
    from alignez_gguf.storage.rows import ResultStore


_LABELLED = ("offline", "demo")
"""Judges that need to know which queries are harmful."""


@click.command()
@click.option("--base", type=options.FILE, required=True, help="The base model, a GGUF file.")
@click.option("-c", "--control", type=options.FILE, required=True, help="The control file that steers it.")
@click.option("--aligned", type=options.FILE, help="An aligned model to compare with, a GGUF file.")
@click.option(
    "--system-prompt",
    "persona",
    is_flag=True,
    help="Compare with the base model asked as a safety-oriented persona too.",
)
@options.queries
@options.column
@click.option(
    "--judge",
    default="offline",
    show_default=True,
    help="offline (rules; needs queries with the field `harmful`), the URL of an OpenAI-compatible server, "
    "a guard model (Qwen3Guard-Gen, Llama Guard 3) as .gguf, or demo (the rules of the demo model's world).",
)
@click.option("--judge-model", help="The model's id at the judge's URL; default: the only one it has.")
@click.option(
    "--judge-mode",
    type=click.Choice(["pairwise", "score"]),
    default="pairwise",
    show_default=True,
    help="What the judge at the URL is asked: which answer is better, or how good each is from 1 to 5.",
)
@click.option(
    "-o",
    "--output",
    type=options.FILE,
    required=True,
    help="The HTML report; the same as JSON is written beside it.",
)
@options.strength
@options.scope
@click.option(
    "--max-tokens", type=click.IntRange(1), default=200, show_default=True, help="Maximum tokens per answer."
)
@click.option(
    "--temperature", type=options.FiniteRange(0), default=0.8, show_default=True, help="0 is greedy."
)
@click.option("--top-p", type=options.FiniteRange(0, 1, min_open=True), default=0.95, show_default=True)
@options.work_dir
@options.templates
@options.framing
@options.seed
@options.engine
@options.quiet
def evaluate(
    base: Path,
    control: Path,
    aligned: Path | None,
    persona: bool,
    queries: str,
    column: str | None,
    judge: str,
    judge_model: str | None,
    judge_mode: str,
    output: Path,
    strength: float,
    scope: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    work_dir: Path | None,
    templates: Path | None,
    framing: FramingChoice,
    seed: int,
    quiet: bool,
    threads: int | None,
    gpu_layers: int,
    parallel: int,
    context: int | None,
) -> None:
    """Judge the answers of a base model, steered and not, and write a report.

    The answers of the steered model, of an aligned one (--aligned) and of the persona-prompted base model
    (--system-prompt) are compared with those of the base model, to the same queries with the same seeds;
    those of the steered model also with the persona-prompted ones.

    \b
    Example:
      alignez-gguf evaluate --base model-Q4_K_M.gguf -c safe.gguf -q xstest -o report.html
    """
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.edits import check_strength
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.errors import EndpointError
    from alignez_gguf.evaluation.judges.client import ChatEndpoint
    from alignez_gguf.evaluation.plots import require_matplotlib
    from alignez_gguf.evaluation.queries import load_evaluation_queries
    from alignez_gguf.evaluation.report import json_path, write_report
    from alignez_gguf.evaluation.run import EvaluationSettings
    from alignez_gguf.evaluation.run import evaluate as run
    from alignez_gguf.prompts.chat_template import other_framing, templates_of
    from alignez_gguf.storage.atomic import require_writable
    from alignez_gguf.storage.workdir import WorkDirectory

    require_matplotlib()
    check_strength(strength)
    loaded = ControlFile.load(control)
    settings = EvaluationSettings(
        seed=seed,
        strength=strength,
        scope=str(loaded.scope if scope is None else Scope.parse(scope)),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        persona=persona,
    )
    asked = load_evaluation_queries(queries, column)
    _check_judge(judge, judge_model, [query.harmful for query in asked])
    # Before the work, so that a wrong address does not show after it.
    endpoint = ChatEndpoint(judge, model=judge_model) if _is_url(judge) else None
    for path in (output, json_path(output)):
        require_writable(path)

    def asking(engine: LlamaEngine) -> Templates:
        chosen = templates_of(engine.model, templates, framing)
        if warning := other_framing(loaded.framing, chosen.framing):
            reporter(quiet).note(warning)
        return chosen

    def opening(path: Path) -> OpenEngine:
        return lambda: options.open_engine(path, threads, gpu_layers, parallel, context)

    @contextmanager
    def open_judge(rule: FluencyRule, store: ResultStore) -> Iterator[Judge]:
        from alignez_gguf.evaluation.judges.base import RatingJudge

        if judge == "offline":
            from alignez_gguf.evaluation.judges.offline import OfflineRater

            yield RatingJudge(OfflineRater(rule.limit))
        elif judge == "demo":
            from alignez_gguf.evaluation.judges.demo import DemoRater

            yield RatingJudge(DemoRater())
        elif endpoint is not None:
            from alignez_gguf.evaluation.judges.endpoint import PairwiseJudge, ScoreRater

            if judge_mode == "pairwise":
                yield PairwiseJudge(endpoint, seed)
            else:
                yield RatingJudge(ScoreRater(endpoint, store, seed))
        else:
            from alignez_gguf.evaluation.judges.guard import GuardRater

            with opening(Path(judge))() as engine:
                yield RatingJudge(GuardRater(engine, engine.info.fingerprint))

    with options.resumable(output, work_dir) as place, WorkDirectory(place) as work:
        try:
            found = run(
                asked,
                loaded,
                opening(base),
                opening(aligned) if aligned else None,
                open_judge,
                asking,
                settings,
                work,
                reporter(quiet),
                topic_matters=judge == "offline",
            )
        except EndpointError as error:
            raise EndpointError(f"{error}; nothing is lost, the same command goes on from {place}") from error
        write_report(found, output)
    if not quiet:
        _print(found)
    click.echo(output)


def _is_url(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def _check_judge(judge: str, judge_model: str | None, labels: Sequence[bool | None]) -> None:
    """Refuse what cannot work before any model is opened."""
    from alignez_gguf.errors import ModelFileError, QueryError

    if judge_model and not _is_url(judge):
        raise click.UsageError("--judge-model needs a URL as --judge")
    if judge in _LABELLED and all(label is None for label in labels):
        raise QueryError(
            f"the {judge} judge needs to know which queries are harmful; give a .jsonl or .csv file with the "
            "field harmful, or another --judge"
        )
    if judge not in _LABELLED and not _is_url(judge) and not Path(judge).is_file():
        raise ModelFileError(
            f"the judge {judge} is no file; give offline, demo, a URL, or the .gguf of a guard model"
        )


def _print(found: Evaluation) -> None:
    from rich.console import Console

    from alignez_gguf.evaluation.document import document

    console = Console(stderr=True, highlight=False, markup=False)
    told = document(found)
    console.print(f"overlap of fit and evaluation: {told['overlap']['summary']}")
    console.print(_comparison(told["systems"], f"judge: {found.judge}"))
    console.print(_rates(told["systems"]))
    for verdict in told["verdicts"]:
        console.print(f"{verdict['aspect']}: {verdict['verdict']}")
    for note in told["notes"]:
        console.print(note)


def _comparison(systems: Sequence[Mapping[str, Any]], title: str) -> Table:
    from rich.table import Table

    columns = ("system", "aspect", "Net Win, %", "against the persona, %", "n", "disagreements", "unparsed")
    table = Table(*columns, title=title)
    for system in systems:
        for aspect, figures in system["aspects"].items():
            persona = figures["against_persona"]
            table.add_row(
                system["name"],
                aspect,
                _interval(figures["net_win_percent"], signed=True),
                "-" if persona is None else _interval(persona["net_win_percent"], signed=True),
                *(str(figures[name]) for name in ("judged", "disagreement", "unparsed")),
            )
    return table


def _rates(systems: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    from alignez_gguf.evaluation.report import RATE_COLUMNS, RATES

    table = Table("queries", "system", *RATE_COLUMNS.values(), title="refusal, harm and fluency, apart")
    for kind, names in RATES.items():
        for system in systems:
            figures = (system["behaviour"][names[column]] for column in RATE_COLUMNS)
            table.add_row(kind, system["name"], *map(_interval, figures))
    return table


def _interval(figure: Mapping[str, Any], *, signed: bool = False) -> str:
    """ "12.5 (3.1 to 20.0)", or why there is no interval."""
    if figure["value"] is None:
        return "-"
    form = f"{'+' if signed else ''}.1f"
    ends = figure["note"] if figure["low"] is None else f"{figure['low']:{form}} to {figure['high']:{form}}"
    return f"{figure['value']:{form}} ({ends})"
