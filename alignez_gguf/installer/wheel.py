"""Wheels of the patched llama-cpp-python that were built elsewhere, and which of them belongs here.

pip installs any wheel of the right name, version and platform. This one also has to be built with the patches
of this alignez-gguf. Knows nothing of compilers, and runs nothing of what it finds.
"""

from __future__ import annotations

import sysconfig
import zipfile
from pathlib import Path

from packaging.tags import Tag, sys_tags
from packaging.utils import parse_wheel_filename

from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import source
from alignez_gguf.runtime.version import VERSION


def matching(path: Path) -> Path:
    """The wheel at `path`, or the one of a folder that suits this platform best, built with our patches.

    Raises:
        RuntimeUnavailableError: there is none; the error says what is wrong with it, or with the nearest.
    """
    wheels = sorted(path.glob("*.whl")) if path.is_dir() else [path]
    if not wheels:
        raise RuntimeUnavailableError(f"there is no wheel in {path}; {_MEND}")
    supported = {tag: rank for rank, tag in enumerate(sys_tags())}
    faults = {wheel: _fault(wheel, supported) for wheel in wheels}
    fitting = [wheel for wheel, (_, fault) in faults.items() if not fault]
    if fitting:
        return min(fitting, key=lambda wheel: _rank(_tags(wheel), supported))
    nearest = max(faults, key=lambda wheel: faults[wheel][0])
    count = "" if len(wheels) == 1 else f"none of the {len(wheels)} wheels in {path} fits: "
    raise RuntimeUnavailableError(f"{count}{nearest.name} {faults[nearest][1]}; {_MEND}")


_MEND = "compile one here: alignez-gguf runtime build"


def _fault(wheel: Path, supported: dict[Tag, int]) -> tuple[int, str]:
    """Return how many checks a wheel passes, and what is wrong with it; empty where nothing is."""
    try:
        name, version, _, tags = parse_wheel_filename(wheel.name)
    except ValueError:
        return 0, "is not named as a wheel is"
    if name != "llama-cpp-python":
        return 0, f"is a wheel of {name}, not of llama-cpp-python"
    if str(version) != VERSION:
        return 1, f"is version {version}, and alignez-gguf is made for {VERSION}"
    if supported.keys().isdisjoint(tags):
        return 2, f"is not for this platform, {sysconfig.get_platform()}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            built_with = source.recorded_patches(zipfile.Path(archive))
    except (OSError, zipfile.BadZipFile) as error:
        return 3, f"cannot be read: {error}"
    if built_with is None:
        return 3, f"lacks llama_cpp/{source.RECORD}: it was not built with the patches of alignez-gguf"
    patches = source.patches_digest(source.patch_files())
    if built_with != patches:
        return 4, f"was built with other patches ({built_with}) than this alignez-gguf has ({patches})"
    return 5, ""


def _tags(wheel: Path) -> frozenset[Tag]:
    return parse_wheel_filename(wheel.name)[3]


def _rank(tags: frozenset[Tag], supported: dict[Tag, int]) -> int:
    """Return the rank of a wheel among those that pip takes here; 0 is the best."""
    return min(supported[tag] for tag in tags if tag in supported)
