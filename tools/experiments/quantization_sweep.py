"""Does a direction that was fitted at one quantization level hold at the others?

    python3 tools/experiments/quantization_sweep.py [MODEL.gguf] [-q QUERIES] [--level LEVEL]... [--out DIR]
                                                    [--json]

Sets up `.venv` first. The control file is made on MODEL as it is, best an F16 or F32 file. Then MODEL is
quantized to each level, where that control file is scored, and beside it the same edit with directions that
are fitted anew on what the quantized model itself writes. All scores are taken on queries that no fit saw. A
second run in the same folder goes on where the first one stopped.

    python3 tools/experiments/quantization_sweep.py --agreement [MODEL.gguf] [--level LEVEL]... [--out DIR]
                                                    [--json]

Instead, how far the patch and the stock form are from each other at each level.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import agreement
import jobs
import plotting
import setup_environment

if TYPE_CHECKING:
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.edits import Edits
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.directions.base import Directions
    from alignez_gguf.pairs.pairs import PreferencePair
    from alignez_gguf.pipeline import Job
    from alignez_gguf.selection.candidates import Candidate
    from alignez_gguf.selection.scoring import EditScore

HELD_OUT_SHARE = 0.4
"""Of the queries: they are only scored on."""
AS_GIVEN = "as given"
SERIES = {"transferred": "fitted on the file as given", "refitted": "fitted anew at this level"}


@dataclass(frozen=True)
class Score:
    """An edit at one level, by the figures of `alignez_gguf.selection.scoring`; nat, and nat per token for
    `kl`."""

    gain: float
    standard_error: float
    kl: float | None


@dataclass(frozen=True)
class Outcome:
    """One level.

    Attributes:
        level: of quantization.
        megabytes: of the file.
        n_queries: that the scores are a mean over.
        transferred: of the control file that was made on the file as given.
        refitted: of the same edit with directions fitted at this level.
        cosine: mean cosine of the principal angles between the directions of both, over the edited layers.
        rates: what the answers do, for a model of the demo world: unsteered, transferred and refitted.
        note: why scores are missing.
    """

    level: str
    megabytes: float | None = None
    n_queries: int = 0
    transferred: Score | None = None
    refitted: Score | None = None
    cosine: float | None = None
    rates: Mapping[str, Mapping[str, float]] | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Reference:
    """What was made on the file as given."""

    control: ControlFile
    candidate: Candidate
    directions: Directions


def main(arguments: Sequence[str]) -> int:
    """Sweep, print and draw; return 0, or end with an error in one line."""
    options = _parse(arguments)
    if options.agreement:
        return _agreement(options)
    draw = None if options.no_plot else plotting.pyplot()
    from alignez_gguf.errors import AlignezError

    try:
        outcomes = Sweep(options).run()
    except AlignezError as error:
        sys.exit(f"Error: {error}")
    document = {
        "model": str(options.model),
        "seed": options.seed,
        "levels": [asdict(one) for one in outcomes],
    }
    (options.out / "sweep.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(document), flush=True)
    else:
        _print_table(outcomes)
    if draw is not None:
        _plot(draw, outcomes, options.out / "sweep.png")
    print(options.out, file=sys.stderr)
    return 0


def _agreement(options: argparse.Namespace) -> int:
    from alignez_gguf.runtime import bindings

    bindings.require_patched()
    options.out.mkdir(parents=True, exist_ok=True)
    found = list(agreement.agreements(options.model, _levels(options.level), options.out, options.threads))
    if options.json:
        print(json.dumps([asdict(one) for one in found]), flush=True)
    else:
        agreement.print_table(found, None if sys.stdout.isatty() else plotting.TABLE_WIDTH)
    return 0 if all(one.holds for one in found) else 1


def _levels(asked: Sequence[str]) -> list[str]:
    """Those that are asked for, or all, the finest first; ends with an error where there is no such level."""
    from alignez_gguf.runtime.quantize import LEVELS

    unknown = sorted(set(asked) - set(LEVELS))
    if unknown:
        sys.exit(f"Error: there is no level {', '.join(unknown)}; choose among {', '.join(LEVELS)}")
    return [level for level in LEVELS if not asked or level in asked]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    root = setup_environment.ROOT
    parser = argparse.ArgumentParser(description="Does a direction hold at other quantization levels?")
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=root / "alignez_gguf" / "demo" / "demo.gguf",
        help="a GGUF, best F16 or F32 (default: the demo model)",
    )
    parser.add_argument("-q", "--queries", help="as for export (default: default; demo for the demo model)")
    parser.add_argument("--level", action="append", default=[], help="only this one; repeatable")
    parser.add_argument(
        "--agreement", action="store_true", help="compare the patch and the stock form, and score nothing"
    )
    parser.add_argument("--method", help="only this method, for the fit on MODEL (default: all)")
    parser.add_argument("--max-tokens", type=int, default=200, help="of an answer (default: 200)")
    parser.add_argument(
        "--rates", type=Path, help="count what answers do: rows of queries of the demo world with labels"
    )
    parser.add_argument("--out", type=Path, default=root / "build" / "quantization_sweep", help="a folder")
    parser.add_argument("--threads", type=int, help="default: the number of physical cores")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-plot", action="store_true", help="draw nothing")
    return parser.parse_args(arguments)


class Sweep:
    """One model at all levels, under the same queries, templates and settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        from alignez_gguf import demo
        from alignez_gguf.pipeline import Settings
        from alignez_gguf.prompts.queries import load_queries
        from alignez_gguf.runtime import bindings

        bindings.require_patched()
        self._options = options
        self._levels = _levels(options.level)
        self._settings = Settings(
            seed=options.seed, method=options.method, max_tokens=options.max_tokens, gate=False
        )
        shipped = options.model.resolve() == demo.MODEL.resolve()
        self._fit, self._held_out = _split(
            load_queries(options.queries or ("demo" if shipped else "default")), options.seed
        )
        self._counted = demo.eval_queries(options.rates) if options.rates else []
        options.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[Outcome]:
        """The outcomes, the file as given first."""
        reference = self._reference()
        as_given = self._outcome(AS_GIVEN, self._options.model, reference)
        return [as_given, *(self._at(level, reference) for level in self._levels)]

    def _at(self, level: str, reference: Reference) -> Outcome:
        from alignez_gguf.control.model_info import ModelInfo
        from alignez_gguf.errors import AlignezError
        from alignez_gguf.runtime.quantize import SUPER_BLOCK, needs_super_blocks, quantize_file

        width = ModelInfo.from_gguf(self._options.model).n_embd
        if needs_super_blocks(level) and width % SUPER_BLOCK:
            return Outcome(level, note=f"skipped: rows of {width} are no multiple of {SUPER_BLOCK}")
        path = self._options.out / f"{self._options.model.stem}-{level}.gguf"
        try:
            quantize_file(self._options.model, path, level, n_threads=self._options.threads or 0)
            return self._outcome(level, path, reference)
        except AlignezError as error:
            return Outcome(level, note=str(error))
        finally:
            path.unlink(missing_ok=True)

    def _reference(self) -> Reference:
        from alignez_gguf.pipeline import export

        with self._open(self._options.model) as job:
            made = export(
                job.engine,
                self._fit,
                job.templates,
                self._settings,
                job.work,
                job.reporter,
                target=job.target,
            )
        made.control.save(self._options.out / "control.gguf")
        selection = made.results[0].selection
        assert selection is not None
        return Reference(made.control, selection.chosen.candidate, made.results[0].directions)

    def _outcome(self, level: str, path: Path, reference: Reference) -> Outcome:
        from alignez_gguf.pipeline.choice import fit_sources
        from alignez_gguf.pipeline.stages import open_scorer, self_generated_pairs, usable_pairs
        from alignez_gguf.pipeline.verdicts import split

        with self._open(path) as job:
            job.reporter.note(f"level: {level}")
            pairs, _ = usable_pairs(job, self_generated_pairs(job, self._fit), ())
            fit_pairs, _, _ = split(pairs, self._settings.seed)
            source = reference.candidate.source
            fits = fit_sources(job, fit_pairs, [source])
            refitted = fits.edits(reference.candidate)
            scope = reference.control.scope
            held_out, _ = usable_pairs(job, self_generated_pairs(job, self._held_out), ())
            with open_scorer(job, _one_each(held_out)) as scored:
                transferred_score = _score(scored.score(reference.control.edits, scope=scope))
                refitted_score = _score(scored.score(refitted, scope=scope))
                n_queries = scored.n_queries
            steered = {"unsteered": {}, "transferred": reference.control.edits, "refitted": refitted}
            rates = self._rates(job, steered, scope)
        layers = list(refitted)
        fitted = fits.of(source).directions
        return Outcome(
            level,
            path.stat().st_size / 1e6,
            n_queries,
            transferred_score,
            refitted_score,
            _mean_cosine(
                reference.directions.vectors[layers, : source.rank], fitted.vectors[layers, : source.rank]
            ),
            rates,
        )

    def _rates(
        self, job: Job, steered: Mapping[str, Edits], scope: Scope
    ) -> Mapping[str, Mapping[str, float]] | None:
        if not self._counted:
            return None
        from alignez_gguf.evaluation.judges.demo import rates

        counts = {}
        for name, edits in steered.items():
            queries = [row.query for row in self._counted]
            texts = jobs.answers(job, edits, scope, queries, f"answering, {name}")
            rows = zip(self._counted, texts, strict=True)
            counts[name] = asdict(rates((row.query, row.harmful, text) for row, text in rows))
        return counts

    def _open(self, path: Path) -> AbstractContextManager[Job]:
        return jobs.open_job(path, self._settings, self._options.out / "work", self._options.threads)


def _split(queries: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Queries to fit on, and others to score on."""
    import random

    held_out = set(random.Random(seed).sample(queries, round(HELD_OUT_SHARE * len(queries))))
    return [query for query in queries if query not in held_out], [q for q in queries if q in held_out]


def _one_each(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    return list({pair.query: pair for pair in pairs}.values())


def _score(figures: EditScore) -> Score:
    return Score(figures.gain, figures.standard_error, figures.kl)


def _mean_cosine(one: Any, other: Any) -> float:
    """Of the principal angles between the row spaces of [n_layer, k, n_embd] each, which are orthonormal."""
    import numpy as np

    return float(np.linalg.svd(one @ other.swapaxes(1, 2), compute_uv=False).mean())


def _print_table(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("level", title="gain in nat on unseen queries (KL in nat per token)")
    for header in ("MB", "transferred", "KL", "fitted anew", "KL", "cosine", "n"):
        table.add_column(header, justify="right")
    for one in outcomes:
        if one.transferred is None or one.refitted is None or one.cosine is None:
            table.add_row(one.level, *[""] * 7)
            continue
        table.add_row(
            one.level,
            f"{one.megabytes:.1f}",
            *_shown(one.transferred),
            *_shown(one.refitted),
            f"{one.cosine:.3f}",
            str(one.n_queries),
        )
    Console(width=None if sys.stdout.isatty() else plotting.TABLE_WIDTH).print(table)
    for one in outcomes:
        if one.note:
            print(f"{one.level}: {one.note}")
        for name, rates in (one.rates or {}).items():
            figures = ", ".join(f"{key.replace('_', ' ')} {rate:.2f}" for key, rate in rates.items())
            print(f"{one.level}, {name}: {figures}")


def _shown(score: Score) -> tuple[str, str]:
    return f"{score.gain:+.2f} +- {score.standard_error:.2f}", "-" if score.kl is None else f"{score.kl:.3f}"


def _plot(pyplot: Any, outcomes: Sequence[Outcome], path: Path) -> None:
    """Gain and cost over the levels, with the standard errors."""
    measured = [one for one in outcomes if one.transferred and one.refitted]
    figure, (gain, cost) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    positions = range(len(measured))
    for (name, label), shift in zip(SERIES.items(), (-0.1, 0.1), strict=True):
        scores = [getattr(one, name) for one in measured]
        at = [position + shift for position in positions]
        errors = [score.standard_error for score in scores]
        gain.errorbar(at, [score.gain for score in scores], errors, fmt="o", capsize=3, label=label)
        cost.plot(at, [score.kl for score in scores], "o", label=label)
    gain.axhline(0, color="grey", linewidth=0.8)
    gain.set_ylabel("gain, nat")
    cost.set_ylabel("KL, nat per token")
    cost.margins(y=0.15)
    cost.set_ylim(bottom=0)
    cost.set_xticks(list(positions), [one.level for one in measured], rotation=30)
    gain.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
