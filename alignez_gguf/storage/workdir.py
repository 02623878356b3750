"""The directory that caches the results of a job, so that an interrupted job continues where it stopped.

Every result lies under a name that contains the hash of its inputs: a changed option finds no old result, and
an unchanged one finds its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from alignez_gguf.closing import Closing
from alignez_gguf.errors import WorkDirectoryError
from alignez_gguf.storage.cached import cached_bytes


class WorkDirectory(Closing):
    """A cache of results that one process at a time may use. A context manager.

    A directory that was created for the job is removed again where nothing was written to it.

    Args:
        path: the directory; created where it is missing.

    Raises:
        WorkDirectoryError: the directory cannot be created, or another process uses it.
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

    def cached_json(self, name: str, make: Callable[[], Any], /, **inputs: Any) -> Any:
        """Return what `make` returned for these inputs, now or in an earlier run, as read back from JSON.

        Args:
            name: the kind of result; part of the file name.
            make: computes a value that JSON can hold; called where the file is missing or damaged.
            inputs: everything that determines the value; hashed by its JSON or its `repr`.

        Raises:
            WorkDirectoryError: the file cannot be read or written.
        """
        path = self.part(name, **inputs).with_suffix(".json")
        return json.loads(cached_bytes(path, lambda: json.dumps(make()).encode()))

    def cached_array(self, name: str, make: Callable[[], NDArray[Any]], /, **inputs: Any) -> NDArray[Any]:
        """Return the array that `make` returned for these inputs; see `cached_json`."""

        def encode() -> bytes:
            np.save(buffer := io.BytesIO(), make())
            return buffer.getvalue()

        path = self.part(name, **inputs).with_suffix(".npy")
        array: NDArray[Any] = np.load(io.BytesIO(cached_bytes(path, encode)))
        return array

    def cached_arrays(
        self, name: str, make: Callable[[], Mapping[str, Any]], /, **inputs: Any
    ) -> dict[str, NDArray[Any]]:
        """Return the arrays by name that `make` returned for these inputs; see `cached_json`."""

        def encode() -> bytes:
            np.savez(buffer := io.BytesIO(), **make())
            return buffer.getvalue()

        path = self.part(name, **inputs).with_suffix(".npz")
        with np.load(io.BytesIO(cached_bytes(path, encode))) as stored:
            return {key: stored[key] for key in stored.files}

    def part(self, name: str, /, **inputs: Any) -> Path:
        """Return the path of a result, without a suffix: its name and the hash of its inputs."""
        text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=repr)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return self.path / f"{name}-{digest}"

    def close(self) -> None:
        self._lock.release()
        if self._is_new and not any(file.is_file() and file.stat().st_size for file in self.path.rglob("*")):
            shutil.rmtree(self.path, ignore_errors=True)
