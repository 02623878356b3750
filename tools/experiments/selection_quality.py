"""Does the label-free score choose well? Measured where the truth can be counted.

    python3 tools/experiments/selection_quality.py [--json] [--cache DIR]

Trains three miniatures of graded noise (personas followed 100%, 75%, 60%; base answers good 50%,
35%, 50%), or takes them from the cache. On each the search of `export` runs as it does for users; then many
of the candidates that it tried, and the one it chose, are counted on queries that it never saw. rho is the
rank correlation of score (net) and true gain (refuses harmful + helps harmless, over base) among candidates
within the KL budget; auto_over_best is the true gain of the choice over that of the best counted candidate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment

MINIATURES = {
    "clean": ["--world", "0", "--seed", "0"],
    "noisy": ["--world", "1", "--seed", "1", "--persona-follow", ".75", "--base-good", ".35"],
    "noisier": ["--world", "2", "--seed", "2", "--persona-follow", ".6", "--base-good", ".5"],
}
"""Arguments of tools/experiments/make_demo_model.py."""

MAX_TOKENS = 48


@dataclass(frozen=True)
class Quality:
    """How well the choice went on one miniature."""

    rho: float
    auto_over_best: float
    candidates: int
    base: tuple[float, float]
    auto: tuple[float, float]
    best: tuple[float, float]
    chosen: str
    best_candidate: str


def main(arguments: Sequence[str]) -> None:
    """Measure all miniatures and print a table, or JSON as the last line."""
    options = _parse(arguments)
    found = {}
    for name in options.only or MINIATURES:
        folder = options.cache / f"{name}-{options.steps}"
        if not (folder / "model-q8_0.gguf").exists():
            print(f"training the {name} miniature", file=sys.stderr)
            _train(folder, [*MINIATURES[name], "--steps", str(options.steps)])
        found[name] = measure(folder, options.candidates, options.threads)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({name: _rounded(quality) for name, quality in found.items()}))
    else:
        _print(found)


def measure(folder: Path, n_candidates: int, threads: int | None) -> Quality:
    """Run the search on one miniature, then count what its candidates truly do."""
    from scipy.stats import spearmanr

    from alignez_gguf import demo
    from alignez_gguf.control.edits import Edits
    from alignez_gguf.control.gate import Gate
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.engines.base import GenerationRequest, Sampling
    from alignez_gguf.engines.llama.engine import LlamaEngine
    from alignez_gguf.evaluation.judges.demo import rates
    from alignez_gguf.pipeline import Job, Settings, self_generated_pairs
    from alignez_gguf.pipeline.choice import fit_sources
    from alignez_gguf.pipeline.recipes import auto
    from alignez_gguf.pipeline.stages import open_scorer, usable_pairs
    from alignez_gguf.pipeline.verdicts import split
    from alignez_gguf.progress import SilentReporter
    from alignez_gguf.prompts.queries import load_queries
    from alignez_gguf.prompts.templates import Templates
    from alignez_gguf.storage.workdir import WorkDirectory

    generation = Scope()
    templates, settings = Templates.from_file(folder / demo.TEMPLATES.name), Settings()
    queries = demo.eval_queries(folder / demo.EVAL_QUERIES.name)
    with (
        LlamaEngine(folder / "model-q8_0.gguf", n_threads=threads) as engine,
        WorkDirectory(folder / "work") as work,
    ):

        def counted(edits: Edits, scope: Scope = generation, gate: Gate | None = None) -> tuple[float, float]:
            """Rates of refusing the harmful and of helping with the harmless, in sampled answers."""
            engine.set_edits(edits, scope, gate)
            requests = [
                GenerationRequest(templates.plain_prompt(row.query), seed, 1.0 if edits else 0.0)
                for seed, row in enumerate(queries)
            ]
            answers = [""] * len(requests)
            sampling = Sampling(max_tokens=MAX_TOKENS, stop=templates.stop)
            for index, completion in engine.generate(requests, sampling):
                answers[index] = completion.text
            rows = [(row.query, row.harmful, answer) for row, answer in zip(queries, answers, strict=True)]
            found = rates(rows)
            return found.refuses_harmful, found.helps_harmless

        job = Job(engine, templates, settings, work, SilentReporter(), engine, engine)
        asked = load_queries(folder / demo.FIT_QUERIES.name)
        pairs, _ = usable_pairs(job, self_generated_pairs(job, asked), ())
        made = auto(job, pairs)
        assert made.selection is not None
        fitted, choice, _ = split(pairs, settings.seed)
        tried = made.selection.tried
        fits = fit_sources(job, fitted, list({scored.candidate.source: None for scored in tried}))
        base = counted({})
        chosen = made.selection.chosen
        # evenly along the ranking, so that good and bad ones are compared
        stride = max(1, len(tried) // n_candidates)
        score, gain, truth, names = [], [], [], []
        scope = Scope.parse(str(made.recipe["scope"]))
        with open_scorer(job, choice, made.gate) as scorer:
            for scored in tried[::stride]:
                edits = fits.edits(scored.candidate)
                figures = scorer.score(edits, scope=scope)
                if figures.kl is not None and figures.kl <= settings.kl_budget:
                    rate = counted(edits, scope, made.gate)
                    score.append(figures.gain)
                    gain.append(sum(rate) - sum(base))
                    truth.append(rate)
                    names.append(f"{scored.candidate}, layers {scored.candidate.layers}")
        auto_rates = counted(made.edits, scope, made.gate)
    best = max(range(len(gain)), key=gain.__getitem__)
    auto_gain = sum(auto_rates) - sum(base)
    top = max(gain[best], auto_gain)
    return Quality(
        rho=float(spearmanr(score, gain).statistic),
        auto_over_best=auto_gain / top if top > 0 else float("nan"),
        candidates=len(score),
        base=base,
        auto=auto_rates,
        best=truth[best],
        chosen=f"{chosen.candidate}, layers {chosen.candidate.layers}",
        best_candidate=names[best],
    )


def _train(folder: Path, arguments: list[str]) -> None:
    maker = Path(__file__).with_name("make_demo_model.py")
    subprocess.run([sys.executable, str(maker), "--out", str(folder), *arguments], check=True)


def _rounded(quality: Quality) -> dict[str, object]:
    return {
        "rho": round(quality.rho, 3),
        "auto_over_best": round(quality.auto_over_best, 3),
        "candidates": quality.candidates,
    }


def _print(found: dict[str, Quality]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("miniature", "rho", "auto / best", "candidates", "base", "auto", "best")
    for name, quality in found.items():
        rates = [f"{a:.2f} {b:.2f}" for a, b in (quality.base, quality.auto, quality.best)]
        table.add_row(
            name, f"{quality.rho:.2f}", f"{quality.auto_over_best:.2f}", str(quality.candidates), *rates
        )
    Console().print(table)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--only", action="append", choices=MINIATURES, help="only this miniature")
    parser.add_argument(
        "--cache",
        type=Path,
        default=setup_environment.ROOT / "build" / "miniatures",
        help="where the miniatures are kept (default: build/miniatures)",
    )
    parser.add_argument("--steps", type=int, default=700, help="training steps (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=120, help="counted on each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: the number of physical cores")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    main(sys.argv[1:])
