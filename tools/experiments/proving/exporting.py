"""`alignez-gguf export` on a real model: how long it takes, and what it writes or says instead."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import alignez_gguf
from alignez_gguf.storage.atomic import write_text
from alignez_gguf.storage.rows import json_sha256
from proving.fetching import Say

FIT = "default"
"""The queries of the fit."""


@dataclass(frozen=True)
class Exported:
    """How an export ended.

    Attributes:
        rc: its exit status.
        minutes: that it took.
        reason: why it wrote nothing; None where it wrote a file.
        control_file: that it wrote.
    """

    rc: int
    minutes: float
    reason: str | None
    control_file: str | None


def export(weights: Path, sha256: str, options: Sequence[str], folder: Path, say: Say) -> Exported:
    """Export into `folder`, where `export.log` holds all that is printed.

    The result of an earlier run with the same model, options and code is taken as it is. An export that was
    interrupted begins anew, so that its time is that of the whole job.
    """
    result = folder / "export.json"
    determined_by = json_sha256([sha256, list(options), _code()])
    if result.exists():
        kept = json.loads(result.read_text(encoding="utf-8"))
        if kept.pop("determined_by") == determined_by and (
            kept["rc"] != 0 or Path(kept["control_file"]).exists()
        ):
            return Exported(**kept)
    folder.mkdir(parents=True, exist_ok=True)
    control, log = folder / "control.gguf", folder / "export.log"
    control.unlink(missing_ok=True)
    work = work_directory(control)
    shutil.rmtree(work, ignore_errors=True)
    command = ["export", str(weights), "-q", FIT, "-o", str(control), "--work-dir", str(work), *options]
    say(f"$ alignez-gguf {shlex.join(command)}   (log: {log})")
    started = time.monotonic()
    rc = alignez(command, log)
    minutes = round((time.monotonic() - started) / 60, 2)
    written = rc == 0 and control.exists()
    reason = None if written else _reason(log).replace(str(weights), weights.name).replace(f"{folder}/", "")
    exported = Exported(rc, minutes, reason, str(control) if written else None)
    if not written:
        shutil.rmtree(work, ignore_errors=True)
    write_text(result, json.dumps({**asdict(exported), "determined_by": determined_by}, indent=1) + "\n")
    return exported


def work_directory(control: Path) -> Path:
    """Where an export keeps what it computes."""
    return control.with_name(f"{control.name}.work")


def alignez(command: Sequence[str], log: Path) -> int:
    """Run the command line of the package; all that it prints goes into `log`."""
    program = Path(sys.executable).with_name("alignez-gguf")
    with log.open("wb") as file:
        return subprocess.run([str(program), *command], stdout=file, stderr=subprocess.STDOUT).returncode


def _reason(log: Path) -> str:
    """The error in the log, or its last line where there is none."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (errors or [line for line in lines if line] or ["it ended without a word"])[-1]


def _code() -> str:
    """A hash of the package, whose every change may change the result."""
    package = Path(alignez_gguf.__file__).parent
    found = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".toml", ".txt"):
            found.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return found.hexdigest()
