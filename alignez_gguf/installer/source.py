"""The pinned source of llama-cpp-python: fetched, checked, unpacked, and patched.

Knows nothing of compilers and wheels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.runtime.version import SDIST_SHA256, VERSION

RECORD = "alignez.json"
"""The file in the package llama_cpp that says which patches it was built with."""

_NAME = f"llama_cpp_python-{VERSION}"
_PACKAGE = Path(__file__).resolve().parents[1]

_LIBRARY_IS_LOADED = "_lib = load_shared_library(_lib_base_name, _base_path)\n"
_LOAD_BACKENDS = '''

def _load_backends() -> None:
    """Load the backends beside libllama, of the CPU the one that suits it best.

    llama_backend_init() looks for them next to the program, which is Python, and in the current folder
    (ggml_backend_load_best in ggml/src/ggml-backend-reg.cpp).
    """
    ggml = _lib
    if not hasattr(ggml, "ggml_backend_load_all_from_path"):  # Windows: a DLL does not pass on what it loads
        ggml = load_shared_library("ggml", _base_path)
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    _lib.llama_log_set(silent, None)  # sets ggml's as well
    ggml.ggml_backend_load_all_from_path(os.fsencode(_base_path))
    _lib.llama_log_set(None, None)
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    if not ggml.ggml_backend_dev_by_type(0):  # GGML_BACKEND_DEVICE_TYPE_CPU
        raise RuntimeError(f"no CPU backend in {_base_path} runs on this machine")


_load_backends()
'''


def cache_directory() -> Path:
    """Return the folder of downloads and built wheels; the variable ALIGNEZ_CACHE_DIR names another."""
    if chosen := os.environ.get("ALIGNEZ_CACHE_DIR"):
        return Path(chosen).expanduser().resolve()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "alignez-gguf"


def source_tree(say: Callable[[str], None] = lambda _: None) -> Path:
    """The unpacked, unpatched source distribution; downloaded once per user.

    The environment variable ALIGNEZ_SOURCE_TREE names a tree that is already unpacked. Not to be written to.

    Raises:
        RuntimeUnavailableError: the tree that was named is not one, or the download fails or is not the file
            that the patches were made for.
    """
    if chosen := os.environ.get("ALIGNEZ_SOURCE_TREE"):
        return _checked_tree(Path(chosen).expanduser().resolve())
    sources = cache_directory() / "source"
    tree = sources / _NAME
    sources.mkdir(parents=True, exist_ok=True)
    with FileLock(sources / "lock"):
        if not tree.is_dir():
            say(f"downloading the source of llama-cpp-python {VERSION} (77 MB)")
            with tempfile.TemporaryDirectory(dir=sources) as temporary:
                archive = _download(Path(temporary))
                unpack(archive, Path(temporary)).rename(tree)
    return tree


def unpack(archive: Path, folder: Path) -> Path:
    """Check the source distribution and unpack it into `folder`; return the tree.

    Raises:
        RuntimeUnavailableError: `archive` is not, byte for byte, the pinned source distribution.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise _another_file(archive, digest)
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:  # Python 3.10.0 to 3.10.11; what is unpacked is known by its hash
            tar.extractall(folder)
    return _checked_tree(folder / _NAME)


_OF_PROGRAMS = ("-common-", "-server-")
"""In the names of patches of what only llama.cpp's own programs are made of."""


def patch_files(*, programs: bool = False) -> list[Path]:
    """The patches of the library, in the order in which they apply.

    Args:
        programs: also those of llama.cpp's programs, which the library is built without.

    Raises:
        RuntimeUnavailableError: there are none, which only a broken installation can bring about.
    """
    installed = _PACKAGE / "installer" / "patches"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "patches"
    patches = sorted(folder.glob("*.patch"))
    if not patches:
        raise RuntimeUnavailableError(f"no patches in {folder}; reinstall alignez-gguf")
    return [patch for patch in patches if programs or not any(part in patch.name for part in _OF_PROGRAMS)]


def apply_patches(tree: Path, patches: Sequence[Path]) -> None:
    """Apply patches, whose paths start at `vendor/llama.cpp`, to a copy of the source tree, in order.

    Raises:
        RuntimeUnavailableError: one does not apply, or there is no program that could apply it. The tree may
            then hold a part of the patches.
    """
    llama_cpp = tree / "vendor" / "llama.cpp"
    for patch in patches:
        if shutil.which("git"):
            command = ["git", "apply", "--whitespace=nowarn", str(patch.resolve())]
        elif shutil.which("patch"):
            command = ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "-i", str(patch.resolve())]
        else:
            raise RuntimeUnavailableError(
                "neither git nor patch is installed; install git to patch llama.cpp"
            )
        # Inside a git repository, `git apply` skips, in silence, every path outside the current folder's.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(llama_cpp.parent.resolve())}
        for name in ("GIT_DIR", "GIT_WORK_TREE"):
            environment.pop(name, None)
        result = subprocess.run(command, cwd=llama_cpp, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            detail = " ".join((result.stderr or result.stdout).split())
            raise RuntimeUnavailableError(
                f"{patch.name} does not apply to llama-cpp-python {_version(tree)}: {detail}; "
                f"use the source of version {VERSION}, or carry the patch forward as patches/README.md says"
            )


def leave_out_common(tree: Path) -> None:
    """Keep a build from compiling libllama-common: a quarter of the work, and Python never loads it."""
    lists = tree / "CMakeLists.txt"
    text = lists.read_text(encoding="utf-8")
    lists.write_text(
        text.replace("set(LLAMA_BUILD_COMMON ON", "set(LLAMA_BUILD_COMMON OFF"), encoding="utf-8"
    )


def load_backends(tree: Path) -> None:
    """Make llama-cpp-python load the backends of a build with GGML_BACKEND_DL from its own folder.

    Raises:
        RuntimeUnavailableError: the source is not the one that this was written for.
    """
    bindings = tree / "llama_cpp" / "llama_cpp.py"
    before, anchor, after = bindings.read_text(encoding="utf-8").partition(_LIBRARY_IS_LOADED)
    if not anchor:
        raise RuntimeUnavailableError(
            f"{bindings} is not that of version {VERSION}; set ALIGNEZ_SOURCE_TREE to its source"
        )
    bindings.write_text(before + anchor + _LOAD_BACKENDS + after, encoding="utf-8")


def patches_digest(patches: Sequence[Path]) -> str:
    """Return a hash of a set of patches that does not depend on the line ends of a checkout."""
    texts = (text for patch in patches for text in (patch.name, patch.read_text(encoding="utf-8")))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def record_patches(tree: Path, patches: Sequence[Path]) -> None:
    """Let the package that is built from `tree` say what it was built from; see `recorded_patches`."""
    text = json.dumps({"llama_cpp_python": VERSION, "patches": patches_digest(patches)})
    (tree / "llama_cpp" / RECORD).write_text(text + "\n", encoding="utf-8")


def recorded_patches(folder: Path | zipfile.Path) -> str | None:
    """Return the digest of the patches that llama_cpp in `folder` was built with; None where it names none.

    Args:
        folder: site-packages, or the inside of a wheel.
    """
    try:
        document = json.loads((folder / "llama_cpp" / RECORD).read_text(encoding="utf-8"))
        return str(document["patches"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _another_file(archive: Path, digest: str) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"{archive.name} has SHA-256 {digest}, not {SDIST_SHA256}: it is another file; clear "
        "pip's cache (pip cache purge), or set ALIGNEZ_SOURCE_TREE to an unpacked copy that you trust"
    )


def _checked_tree(tree: Path) -> Path:
    if not (tree / "vendor" / "llama.cpp" / "CMakeLists.txt").is_file():
        raise RuntimeUnavailableError(f"{tree} is not an unpacked source distribution of llama-cpp-python")
    return tree


def _version(tree: Path) -> str:
    try:
        lines = (tree / "llama_cpp" / "__init__.py").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "(unknown)"
    return next((line.split('"')[1] for line in lines if line.startswith('__version__ = "')), "(unknown)")


def _download(folder: Path) -> Path:
    # With its hash, since pip runs the build backend of what it downloads, for the metadata, before we see it
    requirement = folder / "requirement.txt"
    requirement.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--no-binary", "llama-cpp-python", "--require-hashes", "--requirement", str(requirement)]
    result = subprocess.run(command, capture_output=True, text=True)
    archive = folder / f"{_NAME}.tar.gz"
    if result.returncode != 0 or not archive.is_file():
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no reason given"]
        # "THESE PACKAGES DO NOT MATCH THE HASHES", "Expected sha256 ...", "Got ..."
        if lines[-1].strip().startswith("Got "):
            raise _another_file(archive, lines[-1].split()[-1])
        raise RuntimeUnavailableError(
            f"pip cannot download llama-cpp-python {VERSION}: {lines[-1]}; connect to a package index, or "
            "set ALIGNEZ_SOURCE_TREE to an unpacked source distribution"
        )
    return archive
