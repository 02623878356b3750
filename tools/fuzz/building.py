"""Compiles the C++ stresses with all of the patched llama.cpp under sanitizers, once per patch.

The result is kept in the cache of the package, beside the wheel.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import source
from alignez_gguf.installer.build import run_logged
from alignez_gguf.runtime.version import VERSION

_HERE = Path(__file__).parent


def program(name: str, sanitizers: str) -> Path:
    """The program `name` of CMakeLists.txt, compiled with `-fsanitize=<sanitizers>`.

    Raises:
        RuntimeUnavailableError: no source, a patch that does not apply, or the compilation fails.
    """
    patches = source.patch_files()
    text = "".join(patch.read_text(encoding="utf-8") for patch in patches)
    key = hashlib.sha256(f"{VERSION}\0{text}".encode()).hexdigest()[:16]
    work = source.cache_directory() / "stress" / key
    build = work / sanitizers.replace(",", "-")
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock"):
        tree = _patched_tree(work, patches)
        flags = [f"-DLLAMA_CPP={tree / 'vendor' / 'llama.cpp'}", f"-DSANITIZERS={sanitizers}"]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _run(["cmake", *generator, "-S", str(_HERE), "-B", str(build), *flags], build.with_suffix(".log"))
        if not (build / name).exists():
            print(f"compiling llama.cpp with -fsanitize={sanitizers}", file=sys.stderr, flush=True)
        parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        compile_it = ["cmake", "--build", str(build), "--target", name, "--parallel", parallel]
        _run(compile_it, build.with_suffix(".log"))
    return build / name


def _patched_tree(work: Path, patches: list[Path]) -> Path:
    """A patched copy of the source; one that ALIGNEZ_SOURCE_TREE names may carry the patches already."""
    tree = work / "source"
    if tree.is_dir():
        return tree
    temporary = work / "source.unfinished"
    shutil.rmtree(temporary, ignore_errors=True)
    original = source.source_tree(lambda line: print(line, file=sys.stderr, flush=True))
    place = Path("vendor") / "llama.cpp"
    # its .git names a repository that is not copied
    shutil.copytree(original / place, temporary / place, ignore=shutil.ignore_patterns(".git"))
    if not all(_carries(temporary, patch) for patch in patches):
        source.apply_patches(temporary, patches)
    return temporary.rename(tree)


def _carries(tree: Path, patch: Path) -> bool:
    """Whether the patch could be taken back, to the last line."""
    llama_cpp = tree / "vendor" / "llama.cpp"
    command = ["git", "apply", "--reverse", "--check", str(patch.resolve())]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(llama_cpp.parent)}
    return subprocess.run(command, cwd=llama_cpp, env=environment, capture_output=True).returncode == 0


def _run(command: list[str], log: Path) -> None:
    lines: list[str] = []
    if run_logged(command, os.environ, log, lines.append) != 0:
        errors = [line.strip() for line in lines if "error" in line.lower()]
        reason = (errors or ["no reason given"])[0]
        raise RuntimeUnavailableError(f"the stresses do not compile: {reason}; the log is {log}")
