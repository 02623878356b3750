"""Build and install llama-cpp-python with the patched llama.cpp.

A wheel is built once per machine, patch and set of flags, and then kept. Nothing half-made is ever seen: a
build works in a folder of its own under a lock, and its result is renamed into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import probe, source
from alignez_gguf.installer.cpu_flags import Attempt, attempts, cpu_flags, portable_flags
from alignez_gguf.installer.status import from_probe
from alignez_gguf.runtime.version import VERSION
from alignez_gguf.storage.atomic import replacing

_NINJA = re.compile(r"\[(\d+)/(\d+)\] ")
_MAKE = re.compile(r"\[ *(\d+)%\] ")
_GRACE_S = 2  # of an interrupted compilation, before it is killed
# What a compiler reads from the environment, next to CMAKE_ARGS.
_COMPILER_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "MACOSX_DEPLOYMENT_TARGET")

# Of what CMake installs: a second copy of the libraries, headers, and the names of libraries (copies as well,
# since wheels have no links) that nothing loads them by.
_NOT_NEEDED = (
    "/bin/",
    "/include/",
    "/lib/",
    "/llama_cpp/lib/*.so.*.*",
    "/llama_cpp/lib/libggml-cpu-*.so.*",
    "/llama_cpp/lib/*.*.*.dylib",
)


class BuildObserver(Protocol):
    """Reports the progress of a build to the user."""

    def say(self, line: str) -> None:
        """A step begins or ends."""

    def progress(self, fraction: float) -> None:
        """The share of the running compilation that is done, 0 to 1."""


@dataclass(frozen=True)
class Wheel:
    """A built wheel whose quantized matrix products work on this machine."""

    path: Path
    cmake_args: tuple[str, ...]
    """The flags that it was built with."""
    reason: str
    """Why these are not simply the flags that were asked for; empty where they are."""
    cached: bool
    """It had been built before."""


def build_wheel(
    observer: BuildObserver,
    cmake_args: Sequence[str] | None = None,
    *,
    patches: Sequence[Path] | None = None,
    rebuild: bool = False,
    portable: bool = False,
) -> Wheel:
    """Build the patched wheel, or find it in the cache.

    Args:
        cmake_args: flags for llama.cpp; by default those of the environment variable CMAKE_ARGS.
        patches: by default those that belong to this version of alignez-gguf.
        rebuild: ignore what was built and learned before.
        portable: build for all CPUs of this platform, and not for the one of this machine.

    Raises:
        RuntimeUnavailableError: no source, compiler or patch that applies, the compilation fails, or no flags
            give a library that works on this machine.
    """
    asked = shlex.split(os.environ.get("CMAKE_ARGS", "")) if cmake_args is None else list(cmake_args)
    patches = source.patch_files() if patches is None else patches
    flags = cpu_flags()
    plan = [Attempt((*asked, *portable_flags()))] if portable else attempts(asked, flags)
    planned = [argument for attempt in plan for argument in attempt.cmake_args]
    machine = _digest(VERSION, *planned, _compiler(), _system(), *sorted(flags), *_environment())
    key = _digest(machine, source.patches_digest(patches))
    cache = source.cache_directory()
    kept, learned, work = cache / "wheels" / key, cache / "flags" / f"{machine}.json", cache / "build" / key
    for folder in (kept.parent, learned.parent, work.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "build" / f"{key}.lock"):
        if not rebuild and (wheel := _kept_wheel(kept)):
            return wheel
        if not rebuild and (known := _learned_attempt(learned)) in plan:
            plan = plan[plan.index(known) :]
        shutil.rmtree(work, ignore_errors=True)
        try:
            tree = work / "source"
            shutil.copytree(source.source_tree(observer.say), tree)
            source.apply_patches(tree, patches)
            source.leave_out_common(tree)
            source.record_patches(tree, patches)
            if "-DGGML_BACKEND_DL=ON" in plan[0].cmake_args:
                source.load_backends(tree)
            observer.say(f"applied {', '.join(patch.name for patch in patches)}")
            log = cache / "build" / f"{key}.log"
            # So that wheels of several patches can lie in one folder, and pip takes them before the stock one
            tag = f"1p{source.patches_digest(patches)}" if portable else ""
            built, attempt = _first_that_works(plan, tree, work, log, observer, tag)
            result = work / "result"
            result.mkdir()
            built.rename(result / built.name)
            _write_json(result / "attempt.json", attempt)
            _write_json(learned, attempt)
            shutil.rmtree(kept, ignore_errors=True)
            result.rename(kept)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Wheel(kept / built.name, attempt.cmake_args, attempt.reason, cached=False)


def wheel_from(path: Path, observer: BuildObserver) -> Wheel:
    """A wheel that was built elsewhere: `path`, or the best one in that folder. It is checked here.

    Raises:
        RuntimeUnavailableError: none that belongs to this alignez-gguf, or it does not work on this machine.
    """
    from alignez_gguf.installer.wheel import matching

    wheel = matching(path)
    observer.say(f"checking {wheel.name}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = from_probe(probe_wheel(wheel, Path(folder)))
    if found.mend:
        raise RuntimeUnavailableError(f"{wheel.name} does not work here: {found.mend}")
    observer.say("checked: it has the patch, and a quantized matrix product works on this machine")
    return Wheel(wheel, (), "", cached=True)


def install(wheel: Path) -> None:
    """Install a wheel into the running interpreter, in place of the llama-cpp-python that is there.

    Raises:
        RuntimeUnavailableError: the interpreter belongs to the system, or pip fails.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    if sys.prefix == sys.base_prefix and (stdlib / "EXTERNALLY-MANAGED").is_file():
        raise RuntimeUnavailableError(
            f"{sys.executable} is managed by the operating system; install alignez-gguf into a virtual "
            "environment (python3 -m venv .venv) and run its alignez-gguf"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--force-reinstall",
        "--no-deps",
        str(wheel),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        raise RuntimeUnavailableError(f"pip cannot install {wheel.name}: {lines[-1]}")


def _first_that_works(
    plan: Sequence[Attempt], tree: Path, work: Path, log: Path, observer: BuildObserver, tag: str
) -> tuple[Path, Attempt]:
    failures = []
    for number, attempt in enumerate(plan, start=1):
        if attempt.reason:
            observer.say(f"building {attempt.reason}")
        wheel = _compile(tree, attempt.cmake_args, work, log, observer, tag)
        result = probe_wheel(wheel, work / "unpacked")
        if result.works:
            observer.say("checked: a quantized matrix product works on this machine")
            return wheel, attempt
        if not result.died:
            raise RuntimeUnavailableError(
                f"the built llama.cpp does not run: {result.failure}; the log is {log}"
            )
        failures.append(result.failure)
        if number < len(plan):
            observer.say(f"the built llama.cpp does not suit this machine ({result.failure}); building again")
    raise RuntimeUnavailableError(
        f"no build of llama.cpp works on this machine ({'; '.join(failures)}); name flags that suit its CPU "
        "in CMAKE_ARGS, beginning with -DGGML_NATIVE=OFF"
    )


def probe_wheel(wheel: Path, folder: Path) -> probe.ProbeResult:
    """Unpack a wheel into `folder`, in place of what is there, and probe the library in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return probe.run(folder)


def share_compiled(line: str) -> float | None:
    """The share of a compilation, 0 to 1, that a line of Ninja or Make says is done."""
    if match := _NINJA.search(line):
        return int(match[1]) / int(match[2])
    match = _MAKE.search(line)
    return int(match[1]) / 100 if match else None


def _compile(
    tree: Path, cmake_args: Sequence[str], work: Path, log: Path, observer: BuildObserver, tag: str
) -> Path:
    """Run pip's build of the tree. A second one with other flags recompiles only what they change.

    Args:
        tag: the build tag in the name of the wheel; empty for none.
    """
    wheels = work / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    environment = os.environ | {
        "CMAKE_ARGS": shlex.join(cmake_args),
        "SKBUILD_BUILD_DIR": str(work / "cmake"),
        "SKBUILD_WHEEL_BUILD_TAG": tag,
        "SKBUILD_WHEEL_EXCLUDE": ";".join(_NOT_NEEDED),
    }
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
    command += ["--wheel-dir", str(wheels), str(tree)]
    minutes = 10 if "-DGGML_CPU_ALL_VARIANTS=ON" in cmake_args else 3
    observer.say(f"compiling llama.cpp (about {minutes} minutes on 2 cores)")
    started = time.monotonic()

    def receive(line: str) -> None:
        if (share := share_compiled(line)) is not None:
            observer.progress(share)

    if run_logged(command, environment, log, receive) != 0:
        lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()]
        errors = [line for line in lines if "error" in line.lower()]
        raise RuntimeUnavailableError(
            f"llama.cpp does not compile: {(errors or lines or ['no output'])[0]}; the log is {log}"
        )
    observer.say(f"compiled in {time.monotonic() - started:.0f} s")
    return next(wheels.glob("*.whl"))


def run_logged(
    command: Sequence[str], environment: Mapping[str, str], log: Path, receive: Callable[[str], None]
) -> int:
    """Run a long `command`, write its output to `log` and each line to `receive`; return its exit status.

    When this is interrupted, by Ctrl-C or by an exception of `receive`, the process and all that it started
    end before the exception goes on.
    """
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that compilers end with pip, whoever is interrupted
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                receive(line)
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and its group: asked first, since ninja passes it on to the compilers' own groups."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # a zombie would keep the group alive
                os.killpg(process.pid, 0)
                time.sleep(0.05)


def _compiler() -> str:
    """The C++ compiler and its version, as it says itself."""
    if os.name == "nt":
        return "msvc"  # CMake finds it in the registry; it is not on the path
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    try:
        text = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeUnavailableError(
            f"no C++ compiler ({compiler[0]}); install one: apt install build-essential, dnf install "
            "gcc-c++, or xcode-select --install"
        ) from error
    return text.partition("\n")[0]


def _system() -> str:
    return " ".join((sysconfig.get_platform(), *platform.libc_ver()))


def _environment() -> list[str]:
    return [f"{name}={os.environ.get(name, '')}" for name in _COMPILER_VARIABLES]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _write_json(path: Path, attempt: Attempt) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(attempt), indent=1) + "\n", encoding="utf-8")


def _learned_attempt(path: Path) -> Attempt | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Attempt(tuple(document["cmake_args"]), document["reason"])


def _kept_wheel(folder: Path) -> Wheel | None:
    attempt = _learned_attempt(folder / "attempt.json")
    wheels = list(folder.glob("*.whl"))
    if attempt is None or not wheels:
        return None
    return Wheel(wheels[0], attempt.cmake_args, attempt.reason, cached=True)
