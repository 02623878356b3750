"""The set-up that every tool begins with: `.venv` with the dependencies, the patched runtime and the package.

    python3 tools/setup_environment.py

Needs Python's standard library alone. A second run finds its stamp and takes no time; an interrupted one
starts again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

_OWN = VENV / "made-by-setup"
"""There from the first moment of a `.venv` that the set-up made: only such a one may be deleted."""
_BUSY = VENV / "setup-busy"
"""There while a step runs; left behind by an interruption, after which no package can be trusted."""
_STAMP = VENV / "setup-stamp"
"""What the finished set-up was made from."""

# With ALIGNEZ_LOCKED=1, every package comes in the version and with a hash of the lock file. Two things are
# not hashed: torch, of which CPU and CUDA builds share a version, with the CUDA libraries that it brings; and
# what pip fetches to build llama-cpp-python, whose own source is (installer/source.py). Not the default: the
# lock is resolved for one platform and Python.
_LOCK = ROOT / "tools" / "requirements.lock"
_LOCK_FITS = ("Linux", "x86_64", "CPython", "3.11")

_TORCH = "torch==2.13.0"
# What `alignez-gguf runtime build` and llama-cpp-python itself import. The package's own installation comes
# last, because pip would otherwise compile the unpatched llama-cpp-python for it.
_BUILD_REQUIREMENTS = (
    "click>=8.1",
    "diskcache>=5.6",
    "filelock>=3.12",
    "gguf>=0.19",
    "jinja2>=3",
    "numpy>=1.26",
    "rich>=13",
    "tomli>=2; python_version < '3.11'",
    "typing-extensions>=4.5",
)
_BUILD_RUNTIME = "import sys; from alignez_gguf.cli import main; sys.exit(main())"


class SetupError(Exception):
    """The set-up cannot go on; the message names the mend."""


def enter() -> None:
    """Set up, then run the calling script again inside `.venv`; returns only there."""
    try:
        ensure()
    except SetupError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the next run starts the set-up again.")
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    command = [str(PYTHON), *sys.argv]
    if os.name == "nt":
        sys.exit(subprocess.run(command).returncode)
    sys.stdout.flush()
    os.execv(PYTHON, command)


def ensure() -> None:
    """Bring `.venv` to what pyproject.toml, the patches and the requested build flags ask for.

    Raises:
        SetupError: something that the set-up needs is missing, or one of its steps fails.
    """
    if _is_done():
        return
    _check_machine()
    locked = _is_locked()
    with _lock():
        if _is_done():
            return
        started = time.monotonic()
        _say(f"setting up {VENV} (up to 12 minutes on 2 cores the first time)")
        _make_venv()
        _STAMP.unlink(missing_ok=True)
        if locked:
            _pip("installing what the lock file names", "--require-hashes", "--no-deps", "-r", str(_LOCK))
        _pip(f"installing {_TORCH}", _TORCH)
        if not locked:
            _pip("installing what the build needs", *_BUILD_REQUIREMENTS)
        _step(
            "building llama-cpp-python with the patch (about 4 minutes on 2 cores, seconds if built before)",
            [str(PYTHON), "-c", _BUILD_RUNTIME, "runtime", "build"],
            {"PYTHONPATH": str(ROOT)},
        )
        title = "installing alignez-gguf and its development tools"
        if locked:
            _pip(title, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        else:
            _pip(title, _TORCH, "--editable", f"{ROOT}[dev]")
        _STAMP.write_text(_fingerprint() + "\n", encoding="utf-8")
        _say(f"set up in {time.monotonic() - started:.0f} s")


def _is_locked() -> bool:
    """Whether the lock file is asked for. Raises `SetupError` where it does not fit this Python."""
    if os.environ.get("ALIGNEZ_LOCKED", "") in ("", "0"):
        return False
    version = ".".join(platform.python_version_tuple()[:2])
    here = (platform.system(), platform.machine(), platform.python_implementation(), version)
    if here != _LOCK_FITS:
        raise SetupError(
            f"{_LOCK.name} is for {' '.join(_LOCK_FITS)}, and this is {' '.join(here)}; unset ALIGNEZ_LOCKED"
        )
    return True


def _is_done() -> bool:
    try:
        return PYTHON.exists() and _STAMP.read_text(encoding="utf-8").strip() == _fingerprint()
    except OSError:
        return False


def _fingerprint() -> str:
    """Of all that the set-up depends on."""
    digest = hashlib.sha256()
    files = [ROOT / "pyproject.toml", Path(__file__), *sorted((ROOT / "patches").glob("*.patch"))]
    if _is_locked():
        files.append(_LOCK)
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    facts = (str(ROOT), platform.python_version(), platform.machine(), os.environ.get("CMAKE_ARGS", ""))
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()


def _check_machine() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - the system's python3 may be older than the package's
        raise SetupError(f"Python {platform.python_version()} is too old; run this with python3.10 or newer")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError("this Python has no venv module; install it: apt install python3-venv")
    if os.name != "nt":
        compiler = (os.environ.get("CXX") or "c++").split()[0]
        mends = {
            compiler: "a compiler: apt install build-essential, dnf install gcc-c++, xcode-select --install",
            "cmake": "cmake: apt install cmake, dnf install cmake, or brew install cmake",
        }
        for program, mend in mends.items():
            if shutil.which(program) is None:
                raise SetupError(f"{program} is not installed; install {mend}")


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """Let one set-up run at a time, where the system has file locks."""
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    with (ROOT / ".venv.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _say("waiting for another set-up of this folder")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_venv() -> None:
    """Make `.venv`, unless there is one that works, is of this Python, and was not left half-made."""
    half_made = _OWN.exists() and _BUSY.exists()
    if VENV.exists() and not half_made and _version_of(PYTHON) == platform.python_version():
        return
    if VENV.exists() and not _OWN.exists() and _version_of(PYTHON):
        raise SetupError(
            f"{VENV} is of Python {_version_of(PYTHON)} and was not made by this tool; "
            "move it away, or run this tool with its Python"
        )
    if VENV.exists():
        _say("removing a .venv that is unfinished or of another Python")
        shutil.rmtree(VENV)
    VENV.mkdir()
    _OWN.touch()
    base = getattr(sys, "_base_executable", None) or sys.executable
    _step(f"making {VENV.name} with Python {platform.python_version()}", [base, "-m", "venv", str(VENV)])


def _version_of(python: Path) -> str:
    code = "import platform; print(platform.python_version())"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _pip(title: str, *arguments: str) -> None:
    _step(title, [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def _step(title: str, command: list[str], environment: dict[str, str] | None = None) -> None:
    _say(title)
    started = time.monotonic()
    _BUSY.touch()
    # Results of a tool are on stdout, so the steps' output goes to stderr.
    result = subprocess.run(command, env=os.environ | (environment or {}), stdout=sys.stderr, cwd=ROOT)
    _BUSY.unlink()
    if result.returncode != 0:
        raise SetupError(f"{title}: failed (the reason is above); mend it and run this again")
    _say(f"  done in {time.monotonic() - started:.0f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    enter()
