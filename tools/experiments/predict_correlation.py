"""Does `predict` rank models by what alignment really gains them? The paper's Figure 3 in miniature.

    python3 tools/experiments/predict_correlation.py [--follow P]... [--steps N] [--models DIR]...
                                                     [--out DIR] [--json]

Sets up `.venv` first. Tiny models are trained (about 3 minutes each on 2 cores, kept for the next run) that
differ in how often an answer follows its persona. Each is held against its prediction: the control file of
`export`, if it finds one, steers the model, and the answers to queries that no fit saw are counted as good or
bad by the grammar of the demo world. The true gain is the Net Win of steered over base, in points. A second
run in the same folder goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jobs
import plotting
import setup_environment

if TYPE_CHECKING:
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.demo import EvalQuery
    from alignez_gguf.pipeline import Job

FOLLOW = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
STEPS = 300
MAX_TOKENS = 48
PREDICTORS = {
    "unfiltered": "accuracy on all pairs",
    "accuracy": "accuracy on pairs of use",
    "adjusted": "accuracy above chance and surface cues",
    "kept": "share of pairs of use",
    "held_out": "held-out gain, nat",
}
PLOTTED = ("unfiltered", "adjusted", "held_out")


@dataclass(frozen=True)
class Outcome:
    """A model, what was predicted of it, and what became of it.

    Attributes:
        model: its folder's name.
        verdict: the outlook that `predict` gives.
        unfiltered, accuracy, adjusted, kept, held_out: see `PREDICTORS`; 0 where there is none.
        base, steered: share of good answers.
        net_win: steered less base, in points.
        standard_error: of `net_win`, over the queries.
        note: why nothing was steered.
    """

    model: str
    verdict: str
    unfiltered: float
    accuracy: float
    adjusted: float
    kept: float
    held_out: float
    base: float
    steered: float
    net_win: float
    standard_error: float
    note: str = ""


def main(arguments: Sequence[str]) -> int:
    """Predict, align, count, print and draw; return 0, or end with an error in one line."""
    options = _parse(arguments)
    draw = None if options.no_plot else plotting.pyplot()
    from alignez_gguf.errors import AlignezError

    try:
        folders = options.models or [_made(options, follow) for follow in options.follow or FOLLOW]
        outcomes = [_outcome(folder, options) for folder in folders]
    except AlignezError as error:
        sys.exit(f"Error: {error}")
    correlations = {name: _spearman(outcomes, name) for name in PREDICTORS}
    document = {"spearman": correlations, "models": [asdict(outcome) for outcome in outcomes]}
    (options.out / "correlation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(document), flush=True)
    else:
        _print_table(outcomes, correlations)
    if draw is not None:
        _plot(draw, outcomes, correlations, options.out / "correlation.png")
    print(options.out, file=sys.stderr)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    root = setup_environment.ROOT
    parser = argparse.ArgumentParser(description="Does `predict` rank models by what alignment gains them?")
    parser.add_argument(
        "--follow",
        action="append",
        type=float,
        metavar="P",
        help=f"a model whose answers follow their persona so often; repeatable (default: {FOLLOW})",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    parser.add_argument(
        "--models",
        action="append",
        type=Path,
        metavar="DIR",
        help="instead: a folder that make_demo_model.py --out wrote; repeatable",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=root / "build" / "predict_correlation",
        help="models, work and results (default: build/predict_correlation)",
    )
    parser.add_argument("--method", help="only this method, for the export (default: all)")
    parser.add_argument("--threads", type=int, help="default: the number of physical cores")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-plot", action="store_true", help="draw nothing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def _made(options: argparse.Namespace, follow: float) -> Path:
    """The folder of a model, trained unless an earlier run has done so."""
    folder: Path = options.out / "models" / f"follow-{follow:g}-steps-{options.steps}-seed-{options.seed}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    settings = {"--persona-follow": follow, "--steps": options.steps, "--seed": options.seed}
    if options.threads:
        settings["--threads"] = options.threads
    command = [sys.executable, str(Path(__file__).with_name("make_demo_model.py")), "--out", str(unfinished)]
    command += [str(part) for setting in settings.items() for part in setting]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        sys.exit(f"Error: training {folder.name} failed (the reason is above); run this again")
    unfinished.rename(folder)
    return folder


def _outcome(folder: Path, options: argparse.Namespace) -> Outcome:
    from alignez_gguf import demo
    from alignez_gguf.pipeline import Settings
    from alignez_gguf.predict import predict
    from alignez_gguf.prompts.queries import load_queries

    settings = Settings(seed=options.seed, method=options.method, max_tokens=MAX_TOKENS, gate=False)
    queries = load_queries(folder / demo.FIT_QUERIES.name)
    counted = demo.eval_queries(folder / demo.EVAL_QUERIES.name)
    work = options.out / "work" / folder.name
    with jobs.open_job(folder / "model-q8_0.gguf", settings, work, options.threads) as job:
        job.reporter.note(f"model: {folder.name}")
        found = predict(job, queries)
        control, note = _exported(job, queries)
        before = _good(job, None, counted)
        after = _good(job, control, counted) if control else before
    own, held_out = found.own, found.held_out
    differences = [new - old for new, old in zip(after, before, strict=True)]
    mean, error = _mean_and_error(differences)
    return Outcome(
        folder.name,
        found.verdict.outlook,
        unfiltered=found.unfiltered or 0.0,
        accuracy=own.best_accuracy if own else 0.0,
        adjusted=own.adjusted if own else 0.0,
        kept=found.pairs.kept / found.pairs.total,
        held_out=held_out.figures.gain if held_out and held_out.figures else 0.0,
        base=sum(before) / len(before),
        steered=sum(after) / len(after),
        net_win=100 * mean,
        standard_error=100 * error,
        note=note,
    )


def _exported(job: Job, queries: Sequence[str]) -> tuple[ControlFile | None, str]:
    """What `export` makes of the model; nothing, and why, where it refuses."""
    from alignez_gguf.errors import NoGainError, QueryError
    from alignez_gguf.pipeline import export

    try:
        made = export(
            job.engine, queries, job.templates, job.settings, job.work, job.reporter, target=job.target
        )
    except (NoGainError, QueryError) as error:
        return None, str(error)
    return made.control, ""


def _good(job: Job, control: ControlFile | None, counted: Sequence[EvalQuery]) -> list[bool]:
    """Whether each answer refuses what is harmful, or helps with what is not."""
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.evaluation.judges.demo import AnswerClass, classify

    queries = [row.query for row in counted]
    if control is None:
        texts = jobs.answers(job, {}, Scope(), queries, "answering, unsteered")
    else:
        texts = jobs.answers(job, control.edits, control.scope, queries, "answering, steered")
    return [
        classify(row.query, row.harmful, text) is (AnswerClass.REFUSES if row.harmful else AnswerClass.HELPS)
        for row, text in zip(counted, texts, strict=True)
    ]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    import numpy as np

    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _spearman(outcomes: Sequence[Outcome], predictor: str) -> float | None:
    """Rank correlation with the true gain; `None` where it is undefined."""
    from scipy.stats import spearmanr

    predicted = [getattr(outcome, predictor) for outcome in outcomes]
    gained = [outcome.net_win for outcome in outcomes]
    if len(set(predicted)) < 2 or len(set(gained)) < 2:
        return None
    return float(spearmanr(predicted, gained).statistic)


def _print_table(outcomes: Sequence[Outcome], correlations: dict[str, float | None]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "verdict", title="what was predicted, and the true gain in points of Net Win")
    for header in ("all pairs", "of use", "adjusted", "kept", "held out", "base", "steered", "gain"):
        table.add_column(header, justify="right")
    for one in outcomes:
        figures = [f"{getattr(one, name):.2f}" for name in (*PREDICTORS, "base", "steered")]
        gain = f"{one.net_win:+.1f} +- {one.standard_error:.1f}"
        table.add_row(one.model, one.verdict, *figures, gain)
    Console(width=None if sys.stdout.isatty() else plotting.TABLE_WIDTH).print(table)
    for name, label in PREDICTORS.items():
        print(f"Spearman's rank correlation of the gain with {label}: {_shown(correlations[name])}")
    for one in outcomes:
        if one.note:
            print(f"{one.model}: not steered: {one.note}")


def _plot(
    pyplot: Any, outcomes: Sequence[Outcome], correlations: dict[str, float | None], path: Path
) -> None:
    """The true gain over each prediction, a point for each model."""
    figure, panels = pyplot.subplots(1, len(PLOTTED), sharey=True, figsize=(11, 4), layout="constrained")
    for panel, name in zip(panels, PLOTTED, strict=True):
        panel.errorbar(
            [getattr(one, name) for one in outcomes],
            [one.net_win for one in outcomes],
            [one.standard_error for one in outcomes],
            fmt="o",
            capsize=3,
        )
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xlabel(PREDICTORS[name])
        panel.set_title(f"Spearman {_shown(correlations[name])}")
    panels[0].set_ylabel("Net Win of steered over base, points")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _shown(correlation: float | None) -> str:
    return "undefined" if correlation is None else f"{correlation:+.2f}"


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
