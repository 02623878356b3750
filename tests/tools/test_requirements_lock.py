"""`tools/requirements.lock` names every package that the tools need, and takes it by its hash alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "tools" / "requirements.lock"
ELSEWHERE = {"torch", "llama-cpp-python"}
"""Installed by steps of their own; the lock file's first lines say why."""
MARKERS = {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    """Versions by name."""
    lines = re.findall(r"^([A-Za-z0-9][\w.-]*)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def wanted(project: dict[str, object], extra: str) -> list[Requirement]:
    """What an extra needs, with the extras that it names in turn."""
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    found = []
    for requirement in map(Requirement, extras[extra]):
        if requirement.name == project["name"]:
            found += [one for name in requirement.extras for one in wanted(project, name)]
        else:
            found.append(requirement)
    return found


def test_lock_covers_every_dependency_in_a_version_that_is_asked_for(locked: dict[str, str]) -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    requirements = [Requirement(one) for one in project["dependencies"]] + wanted(project, "dev")
    requirements += map(Requirement, document["build-system"]["requires"])
    missing = [
        str(one)
        for one in requirements
        if one.name not in ELSEWHERE
        and (one.marker is None or one.marker.evaluate(MARKERS))
        and not ((version := locked.get(canonicalize_name(one.name))) and one.specifier.contains(version))
    ]
    assert not missing, "make the lock file again, as its first lines say"
    assert len(requirements) > 20


def test_every_package_of_the_lock_has_hashes_and_no_address() -> None:
    text = LOCK.read_text(encoding="utf-8")
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for requirement in re.split(r"(?<!\\)\n", body.strip()):
        assert re.fullmatch(r"[a-z0-9.-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", requirement), (
            requirement
        )
    assert "://" not in text


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_lock_leaves_out_what_has_a_step_of_its_own(locked: dict[str, str], name: str) -> None:
    assert name not in locked


def test_lock_for_another_python_is_refused_and_not_passed_over() -> None:
    program = (
        "import platform, setup_environment\n"
        "platform.machine = lambda: 'riscv64'\n"
        "try: setup_environment.ensure()\n"
        "except setup_environment.SetupError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"ALIGNEZ_LOCKED": "1", "PYTHONPATH": str(ROOT / "tools")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "riscv64" in done.stdout
    assert "unset ALIGNEZ_LOCKED" in done.stdout
