"""The directory in which a job keeps what it has done, so that it can go on after any interruption.

Every part lies under a name that hashes all that determines it: a changed option finds no old part to reuse,
and an unchanged one finds its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from alignez_gguf.errors import WorkDirectoryError


class WorkDirectory:
    """A directory that one process at a time may use. A context manager.

    One that was made for the job and in which nothing was done is removed again.

    Raises:
        WorkDirectoryError: the directory cannot be made, or another process uses it.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / "lock", timeout=0)
            self._lock.acquire()
        except Timeout as error:
            raise WorkDirectoryError(
                f"another process is at work in {self.path}; wait for it, or choose another --work-dir"
            ) from error
        except OSError as error:
            raise WorkDirectoryError(
                f"cannot work in {self.path} ({error.strerror or error}); choose another --work-dir"
            ) from error

    def part(self, name: str, **determined_by: Any) -> Path:
        """The place of one part of the job: its name and the hash of all that determines it."""
        text = json.dumps(determined_by, sort_keys=True, ensure_ascii=False, default=repr)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return self.path / f"{name}-{digest}"

    def close(self) -> None:
        self._lock.release()
        if self._is_new and not any(file.is_file() and file.stat().st_size for file in self.path.rglob("*")):
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
