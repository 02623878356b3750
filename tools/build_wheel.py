"""Build a wheel of the patched llama-cpp-python that runs on every CPU of this platform.

    python3 tools/build_wheel.py [--output DIR]

On Linux and Windows it holds a CPU backend per instruction set (with and without AVX2, AVX-512, VNNI and
AMX), of which a machine loads the best that it supports; on macOS, Metal and one CPU backend. `alignez-gguf
runtime build --wheel` installs it. CMAKE_ARGS adds flags. About 10 minutes on 2 cores.

Needs a compiler, the packages filelock and gguf, and to try the wheel those of llama-cpp-python: diskcache,
jinja2, numpy and typing-extensions. It sets nothing up, so that it runs in the containers for manylinux.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str]) -> int:
    """Build the wheel, copy it to the output folder and print its path."""
    options = _parse(arguments)
    sys.path.insert(0, str(ROOT))
    from alignez_gguf.errors import AlignezError
    from alignez_gguf.installer.build import build_wheel

    try:
        wheel = build_wheel(_Lines(), portable=True, rebuild=options.rebuild)
    except AlignezError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    print(shutil.copy2(wheel.path, options.output))
    return 0


class _Lines:
    """Tells the steps of a build on stderr."""

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def progress(self, fraction: float) -> None:
        pass


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: %(default)s")
    parser.add_argument("--rebuild", action="store_true", help="build again, also where it was built before")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
