"""Describes the runtime of this Python environment, and what it lacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignez_gguf.installer import probe
from alignez_gguf.installer.source import patch_files, patches_digest
from alignez_gguf.runtime.bindings import PATCH_VERSION, other_patch
from alignez_gguf.runtime.version import VERSION

_MEND = "run: alignez-gguf runtime build"


@dataclass(frozen=True)
class Device:
    """A device that a backend of ggml offers."""

    name: str
    description: str


@dataclass(frozen=True)
class RuntimeStatus:
    """The llama-cpp-python that this interpreter imports."""

    version: str | None
    """None where there is none, or none that loads."""
    location: str | None
    library: str | None
    """The libllama that it loads."""
    patched: bool
    patches: str | None
    """The digest of the patches that it was built with (`source.patches_digest`), where the build says so."""
    steers: Literal["patched", "stock", "no"]
    """How `steer` reaches it: through the patch, through the adapters of stock llama.cpp, or not at all."""
    devices: tuple[Device, ...]
    system_info: str
    """The instruction sets and options that ggml was built with, as llama.cpp says them."""
    quantized_products: bool
    """Quantized matrix products work on this CPU."""
    mend: str
    """What is missing, and what to do about it; empty where nothing is."""


def status(site: Path | None = None) -> RuntimeStatus:
    """Look at the llama-cpp-python that this interpreter imports, or at the one in `site`.

    It is loaded in a child process, so a library that kills its process is reported as well.
    """
    return from_probe(probe.run(site))


def from_probe(found: probe.ProbeResult) -> RuntimeStatus:
    """Return the status that follows from a probe."""
    description = found.description
    version = description.get("version")
    patch_version: int | None = description.get("patch_version")
    patched = patch_version == PATCH_VERSION
    patches, ours = description.get("patches"), patches_digest(patch_files())
    if version is None:
        mend = f"llama-cpp-python cannot be loaded ({found.failure}); {_MEND}"
    elif version != VERSION:
        mend = f"llama-cpp-python is {version}, alignez-gguf is made for {VERSION}; {_MEND}"
    elif patch_version is not None and not patched:
        mend = other_patch(patch_version)
    elif not patched:
        mend = (
            "llama-cpp-python lacks the patch, so steer() works through adapters, without additions at layer "
            f"0, and chat and generate cannot steer; {_MEND}"
        )
    elif patches not in (None, ours):
        mend = f"llama-cpp-python was built with other patches ({patches}, not {ours}); {_MEND}"
    elif not found.works:
        mend = f"{found.failure}; {_MEND} --rebuild"
    else:
        mend = ""
    return RuntimeStatus(
        version=version,
        location=description.get("location"),
        library=description.get("library"),
        patched=patched,
        patches=patches,
        steers=_steers(version, patch_version),
        devices=tuple(Device(**device) for device in description.get("devices", ())),
        system_info=description.get("system_info", ""),
        quantized_products=found.works,
        mend=mend,
    )


def _steers(version: str | None, patch_version: int | None) -> Literal["patched", "stock", "no"]:
    if version != VERSION or patch_version not in (None, PATCH_VERSION):
        return "no"
    return "stock" if patch_version is None else "patched"
