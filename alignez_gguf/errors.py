"""One family of errors. Every message is one line that says what is wrong and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class AlignezError(Exception):
    """Base of every error that a user can meet; the command line prints it and exits 1."""


class ModelFileError(AlignezError):
    """A model file is missing, truncated, not a GGUF, or of a kind that cannot be used."""


class ControlFileError(AlignezError):
    """A control file is malformed, or does not fit the model it is meant for."""


class QueryError(AlignezError):
    """A query file, a query or a prompt cannot be used."""


class TemplateError(AlignezError):
    """A prompt template file is malformed."""


class RuntimeUnavailableError(AlignezError):
    """llama-cpp-python is missing, of another version, or lacks the patch."""


class MissingExtraError(AlignezError):
    """A package of an optional extra is not installed, or cannot be imported."""


class SteeringError(AlignezError):
    """An edit, a strength or a scope cannot be applied to a model in full."""


class NoGainError(AlignezError):
    """Nothing that was tried makes the model safer within the budget."""


class WorkDirectoryError(AlignezError):
    """A work directory is locked by another process, belongs to another job, or cannot be used."""

    @classmethod
    def of(cls, verb: str, path: Path, error: OSError) -> WorkDirectoryError:
        """What the system said when a file in it was to be opened, read or written."""
        return cls(
            f"cannot {verb} {path}: {error.strerror or error}; make room for it, or choose another --work-dir"
        )


class OutputError(AlignezError):
    """A file cannot be written."""


class EndpointError(AlignezError):
    """A completions endpoint cannot be reached, refuses a request, or answers with something else."""


@contextmanager
def require_extra(extra: str, purpose: str, alternative: str = "") -> Iterator[None]:
    """Report a failed import inside the block as the extra of this package that provides it.

    Args:
        extra: the name of the extra in pyproject.toml.
        purpose: what needs the package, as the subject of a sentence: "the server".
        alternative: what the user can do without the extra: "give a .csv".

    Raises:
        MissingExtraError: a package that is not alignez_gguf or llama_cpp could not be imported.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("alignez_gguf", "llama_cpp"):
            raise
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise MissingExtraError(
            f"{purpose} needs {package or extra}{reason}; run: pip install 'alignez-gguf[{extra}]'"
            + (f", or {alternative}" if alternative else "")
        ) from error
