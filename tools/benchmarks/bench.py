"""Measure speed and memory, each figure held against an anchor that runs beside it, repeated.

    python3 tools/benchmarks/bench.py [--only steering] [--model M.gguf] [--json]
                                      [--write docs/performance.md]

steering    decoding and prefill under an edit over the same without: the patch with rank 1 and rank 4 at
            every layer, the forms that stock llama.cpp takes, and the merged model. Times; less is better
generation  self-generated answers, tokens/s, over a loop over Llama.__call__ and over llama.cpp's
            llama-batched-bench. Speeds; more is better
reading     activations of all layers, tokens/s, over the same prompts unread, over llama.cpp's
            llama-cvector-generator and over repeng. Speeds; more is better
ccs         fitting CCS probes, over a plain loop over layers and restarts, of which a part is run, and
            scikit-learn's logistic regression. Times of these over ours; more is better
switching   milliseconds of a change of strength or control file, and the token after it
end_to_end  minutes from a model to its control file with both recipes, by stages, and the peak memory
growth      time with 2, 4 and 8 times the queries, pairs, layers, over the straight line. Less is better

The model is a random one of 22 x 2048 in Q4_K_M unless one is given. All of it takes about an hour on a
quiet machine of 2 cores. llama.cpp's programs are looked for in --llama-bin; to build them:
python3 tools/build_llama_tools.py llama-batched-bench llama-cvector-generator. repeng is taken where it is
installed (pip install --no-deps repeng). With --json the last line is one object; what could not be measured
is null.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import setup_environment

if TYPE_CHECKING:
    from benchmarks.figures import Measured
    from benchmarks.setting import Setting

MEASUREMENTS = ("steering", "generation", "reading", "ccs", "switching", "end_to_end", "growth")
"""Each is the function `measure` of the module of this name in this folder."""

BUILD = setup_environment.ROOT / "build"


def main() -> None:
    """Run the measurements; end with an error in one line where one cannot be made."""
    options = _parse()
    from alignez_gguf.errors import AlignezError
    from benchmarks.figures import BenchError

    try:
        _run(options)
    except (AlignezError, BenchError) as error:
        sys.exit(f"Error: {error}")


def _run(options: argparse.Namespace) -> None:
    """Print a table after each measurement, and JSON as the last line where that is asked for."""
    from benchmarks import report

    setting = _setting(options)
    about = report.about_machine(setting.model, setting.n_threads, setting.n_gpu_layers)
    names = options.only or MEASUREMENTS
    if options.write is not None:
        report.require_places(options.write, names, about["device"])
    found: dict[str, Measured] = {}
    for name in names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        found[name] = import_module(f"benchmarks.{name}").measure(setting)
        print(report.as_text({name: found[name]}), flush=True)
        if options.write is not None:
            report.write(options.write, {name: found[name]}, about)
    if options.json:
        print(json.dumps(report.as_json(found, about)))


def _setting(options: argparse.Namespace) -> Setting:
    from alignez_gguf.runtime.model import physical_cores
    from benchmarks.make_bench_model import SHAPES, make
    from benchmarks.setting import Setting

    cache = BUILD / "bench"
    return Setting(
        model=options.model or make(SHAPES["22x2048"], "Q4_K_M", cache),
        cache=cache,
        repeats=options.repeats,
        pairs=options.pairs,
        n_threads=options.threads or physical_cores(),
        n_gpu_layers=options.gpu_layers,
        llama_bin=options.llama_bin,
        n_queries=options.queries,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="only this measurement")
    parser.add_argument("--model", type=Path, help="measure on this GGUF")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of runs that take long (default: %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=int, default=15, help="of short runs, base and other (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="of llama.cpp (default: the physical cores)")
    parser.add_argument(
        "--gpu-layers", type=int, default=-1, help="layers on a GPU; -1 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--llama-bin",
        type=Path,
        default=Path(os.environ.get("ALIGNEZ_LLAMA_BIN", BUILD / "llama.cpp" / "bin")),
        help="the folder of llama.cpp's programs (default: $ALIGNEZ_LLAMA_BIN, else build/llama.cpp/bin)",
    )
    parser.add_argument("--queries", type=int, default=64, help="of end_to_end (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this document")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    return parser.parse_args()


if __name__ == "__main__":
    _parse()  # --help and bad usage need no set-up
    setup_environment.enter()
    main()
