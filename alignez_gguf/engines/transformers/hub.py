"""Whether a name is a model on the Hugging Face hub: asked once, where transformers would retry."""

from __future__ import annotations

from pathlib import Path

from alignez_gguf.errors import ModelFileError

_TIMEOUT = 10.0
"""Seconds for the one request."""
_GIVE = "give a GGUF file, a model directory or a hub id"


def require_findable(source: str) -> None:
    """Refuse a name that is neither a directory, nor in the hub's local cache, nor a model on the hub.

    Raises:
        ModelFileError: there is no such file, and no such model, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if Path(source).is_dir():
        return
    if Path(source).exists() or _is_path(source):
        raise ModelFileError(f"there is no model directory {source}; {_GIVE}")
    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=_TIMEOUT)
    except GatedRepoError:
        return  # it is there; loading it says what to do
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelFileError(
            f"there is no file or folder {source}, and no model of that name on the hub; {_GIVE}"
        ) from error
    except Exception as error:  # whatever the HTTP client raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelFileError(
            f"there is no file or folder {source}, and the hub cannot be asked for a model of that name: "
            f"{reason.rstrip('.')}; {_GIVE}"
        ) from error


def _is_path(source: str) -> bool:
    """Whether a source can only be a path: a hub id has one slash at most, in the middle."""
    return (
        source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or source.endswith("/")
    )
