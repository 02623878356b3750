"""Build llama.cpp's own programs from the patched source, with RPC.

    python3 tools/build_llama_tools.py [PROGRAM]... [--output DIR]

Sets up `.venv` first. Unless others are named: llama-server, llama-cli and llama-completion, which take a
control file with `--control-vector` and servers with `--rpc`, and ggml-rpc-server, which lends a machine to
them and to `alignez-gguf ... --rpc`. Compiled with the flags that the runtime was built with, so they run on
this CPU, and static, so that they run where they are put. About 20 minutes on 2 cores the first time.

RPC is neither encrypted nor authenticated: run ggml-rpc-server on networks that you trust alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import setup_environment

from alignez_gguf.runtime.version import VERSION

if TYPE_CHECKING:
    from alignez_gguf.progress import Reporter

PROGRAMS = ("llama-server", "llama-cli", "llama-completion", "ggml-rpc-server")
OUTPUT = setup_environment.ROOT / "build" / "llama.cpp" / "bin"

# LLAMA_BUILD_UI would run npm, LLAMA_USE_PREBUILT_UI would download.
_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_RPC=ON",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("APP", "EXAMPLES", "TESTS", "UI")),
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
_STEPS = 1000


def main(arguments: Sequence[str]) -> int:
    """Build, copy the programs to the output folder and print their paths."""
    options = _parse(arguments)
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.errors import AlignezError

    programs = options.programs or PROGRAMS
    try:
        built = build(programs, reporter(options.quiet))
    except AlignezError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the next run goes on with what is compiled.", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    for program in programs:
        print(_copy(built, f"{program}.exe" if os.name == "nt" else program, options.output))
    return 0


def build(programs: Sequence[str], report: Reporter, *, patched: bool = True) -> Path:
    """Compile programs in the cache, from the patched source or the stock one; the folder that holds them.

    Raises:
        RuntimeUnavailableError: no source, compiler or patch that applies, or the compilation fails.
    """
    from filelock import FileLock

    from alignez_gguf.installer import source
    from alignez_gguf.installer.build import build_wheel

    patches = source.patch_files(programs=True) if patched else []
    flags = [*build_wheel(_Notes(report)).cmake_args, *_FLAGS]
    key = hashlib.sha256("\0".join(flags).encode() + b"".join(patch.read_bytes() for patch in patches))
    work = source.cache_directory() / "programs" / f"{VERSION}-{key.hexdigest()[:16]}"
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock"):
        tree, built = _patched_tree(work, patches, report), work / "build"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        report.note(f"compiling {', '.join(programs)} in {built}")
        configure = ["cmake", *generator, "-S", str(tree / "vendor" / "llama.cpp"), "-B", str(built), *flags]
        _run(configure, "configuring", work / "configure.log", report)
        parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        command = ["cmake", "--build", str(built), "--config", "Release", "--parallel", parallel]
        _run([*command, "--target", *programs], "compiling", work / "compile.log", report)
    return built / "bin"


def _patched_tree(work: Path, patches: Sequence[Path], report: Reporter) -> Path:
    """A patched copy of the source, made once."""
    from alignez_gguf.installer import source

    tree = work / "source"
    if not tree.is_dir():
        unfinished = work / "source.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source.source_tree(report.note), unfinished)
        source.apply_patches(unfinished, patches)
        unfinished.rename(tree)
    return tree


def _run(command: Sequence[str], title: str, log: Path, report: Reporter) -> None:
    from alignez_gguf.errors import RuntimeUnavailableError
    from alignez_gguf.installer.build import run_logged, share_compiled

    with report.stage(title, _STEPS) as advance:
        done = 0

        def receive(line: str) -> None:
            nonlocal done
            now = round(_STEPS * (share_compiled(line) or 0))
            if now > done:
                advance(now - done)
                done = now

        status = run_logged(command, os.environ, log, receive)
        advance(_STEPS - done)
    if status != 0:
        lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()]
        errors = [line for line in lines if "error" in line.lower()]
        raise RuntimeUnavailableError(f"{title} failed: {(errors or lines or ['no output'])[0]}; see {log}")


def _copy(folder: Path, name: str, output: Path) -> Path:
    """Put a program into the output folder, also where one of that name is running."""
    found = next(path for path in (folder / name, folder / "Release" / name) if path.is_file())
    unfinished = output / f"{name}.unfinished"
    shutil.copy2(found, unfinished)
    return unfinished.replace(output / name)


class _Notes:
    """Hands the steps of a build of the runtime to a reporter."""

    def __init__(self, report: Reporter) -> None:
        self._report = report

    def say(self, line: str) -> None:
        self._report.note(line)

    def progress(self, fraction: float) -> None:
        pass


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"default: {' '.join(PROGRAMS)}")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
