"""Try to break it: hostile files, faults, sanitizers, bad clients. One table; exits with 1 on a finding.

    python3 tools/fuzz/stress.py [--only loader] [--short] [--seed 1] [--json] [--write docs/reliability.md]

loader      mutated control files through the loader of the patched llama.cpp, under ASan and UBSan
sanitizers  edits set, changed and cleared, beside another context, under ASan, UBSan and TSan
reader      mutated files through the readers of the package
faults      commands killed, interrupted, and refused the disk
serving     bad clients, and good ones among them, of `alignez-gguf serve`

All of it takes up to 30 minutes on 2 quiet cores; the first time, and after a change of the patch, llama.cpp
is compiled twice before, which takes 10 more. What stands behind a finding is kept in build/stress.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment

from fuzz import LONG, SHORT, Outcome, Scale, Stress

STRESSES = ("reader", "loader", "faults", "sanitizers", "serving")
"""Modules of `fuzz`, those that take long first."""

_FOLDER = setup_environment.ROOT / "build" / "stress"
_AT_ONCE = 2


def run(name: str, scale: Scale) -> list[Outcome]:
    """Run one stress in a fresh folder."""
    folder = _FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stress: Stress = importlib.import_module(f"fuzz.{name}").stress
    return list(stress(scale, folder))


def run_all(names: Sequence[str], scale: Scale) -> dict[str, list[Outcome]]:
    """Run stresses two at a time, in processes apart; outcomes in the order of `names`."""
    found = {}
    began = time.monotonic()
    with ProcessPoolExecutor(_AT_ONCE, mp_context=multiprocessing.get_context("spawn")) as processes:
        running = {processes.submit(run, name, scale): name for name in names}
        for done in as_completed(running):
            name = running[done]
            try:
                found[name] = done.result()
            except Exception as error:  # the others go on, and what did not run is no success
                traceback.print_exception(error)
                found[name] = [Outcome(name, 0, (f"did not run: {error!r}",))]
            minutes = (time.monotonic() - began) / 60
            print(f"{name}: done after {minutes:.1f} minutes", file=sys.stderr, flush=True)
    return {name: found[name] for name in names}


def main() -> int:
    """Run what was asked for, print it, and say whether there was a finding."""
    options = _parse()
    sys.path.insert(0, str(setup_environment.ROOT))
    from fuzz import report

    if options.write is not None and not report.has_place(options.write):
        sys.exit(f"Error: {options.write} has no {report.MARK} ... {report.END} to put the table into")
    scale = replace(SHORT if options.short else LONG, seed=options.seed)
    began = time.monotonic()
    found = run_all(options.only or STRESSES, scale)
    outcomes = [outcome for name in found for outcome in found[name]]
    report.show(outcomes)
    if options.write is not None:
        report.write(options.write, outcomes, seconds=time.monotonic() - began, seed=options.seed)
    if options.json:
        print(json.dumps(report.as_json(outcomes)))
    return 1 if any(outcome.findings for outcome in outcomes) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", action="append", choices=STRESSES, help="only this stress; may be repeated")
    parser.add_argument("--short", action="store_true", help="a few of each, in minutes")
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this document")
    return parser.parse_args()


if __name__ == "__main__":
    _parse()  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main())
