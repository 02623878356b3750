"""Wheels of the patched llama-cpp-python from elsewhere: which are taken, and why others are not."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.tags import sys_tags

import alignez_gguf.installer.status as status_module
from alignez_gguf.cli import main
from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import build, probe, source
from alignez_gguf.installer.wheel import matching
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.version import VERSION
from tests.installer.test_build import DIES, Lines, fake_llama_cpp

OURS = json.dumps({"patches": source.patches_digest(source.patch_files())})
OTHERS = json.dumps({"patches": "0123456789ab"})
HERE = next(tag.platform for tag in sys_tags() if tag.platform != "any")
NAME = f"llama_cpp_python-{VERSION}-py3-none-any.whl"


def wheel(folder: Path, name: str = NAME, record: str | None = OURS) -> Path:
    """A wheel with nothing in it but the record of its patches."""
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llama_cpp/__init__.py", "")
        if record is not None:
            archive.writestr(f"llama_cpp/{source.RECORD}", record)
    return path


def test_a_wheel_of_this_platform_version_and_patches_matches(tmp_path: Path) -> None:
    for name in (NAME, NAME.replace("-any", f"-{HERE}"), NAME.replace("-py3", "-1p0123456789ab-py3")):
        path = wheel(tmp_path, name)
        assert matching(path) == path


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("llama.whl", OURS, "is not named as a wheel is"),
        (NAME.replace("llama_cpp_python", "torch"), OURS, "is a wheel of torch"),
        (NAME.replace(VERSION, "0.3.9"), OURS, f"is version 0.3.9, .*{VERSION}"),
        (NAME.replace("-any", "-plan9_mips"), OURS, "not for this platform"),
        (NAME.replace("py3-none", "cp26-cp26m"), OURS, "not for this platform"),
        (NAME, None, "was not built with the patches"),
        (NAME, "[]", "was not built with the patches"),
        (NAME, OTHERS, "other patches .0123456789ab. than"),
    ],
)
def test_any_other_wheel_is_refused_in_one_line_with_the_reason_and_the_mend(
    tmp_path: Path, name: str, record: str | None, message: str
) -> None:
    with pytest.raises(RuntimeUnavailableError, match=message) as error:
        matching(wheel(tmp_path, name, record))
    assert str(error.value).startswith(f"{name} ")
    assert str(error.value).endswith("alignez-gguf runtime build")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"half a download")
    with pytest.raises(RuntimeUnavailableError, match="cannot be read"):
        matching(tmp_path / NAME)


def test_a_folder_gives_the_wheel_that_matches_and_of_several_the_one_of_the_platform(tmp_path: Path) -> None:
    wheel(tmp_path, NAME.replace(VERSION, "0.3.9"))
    wheel(tmp_path, NAME.replace("-py3", "-2-py3"), OTHERS)
    wheel(tmp_path, NAME.replace("llama_cpp_python", "torch"))
    general = wheel(tmp_path)
    assert matching(tmp_path) == general
    special = wheel(tmp_path, NAME.replace("-any", f"-{HERE}"))
    assert matching(tmp_path) == special


def test_a_folder_without_a_match_says_what_is_wrong_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="there is no wheel in"):
        matching(tmp_path)
    wheel(tmp_path, NAME.replace("llama_cpp_python", "torch"))
    wheel(tmp_path, record=OTHERS)
    wheel(tmp_path, NAME.replace("-any", "-plan9_mips"))
    with pytest.raises(RuntimeUnavailableError, match=f"none of the 3 wheels .*: {NAME} .*other patches"):
        matching(tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama-cpp-python of this environment, as a wheel."""
    import llama_cpp

    package = Path(llama_cpp.__file__).parent
    path = tmp_path_factory.mktemp("installed") / NAME
    with zipfile.ZipFile(path, "w") as archive:
        for file in package.rglob("*"):
            if file.is_file() and file.name != source.RECORD and file.suffix != ".pyc":
                archive.write(file, Path("llama_cpp", file.relative_to(package)))
        archive.writestr(f"llama_cpp/{source.RECORD}", OURS)
    return path


def test_a_wheel_that_works_on_this_machine_is_taken(installed: Path) -> None:
    taken = build.wheel_from(installed.parent, Lines())
    assert taken.path == installed


def test_a_wheel_that_dies_on_this_cpu_is_refused_before_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"version": VERSION, "patch_version": bindings.PATCH_VERSION}
    dies = probe.ProbeResult(described, works=False, died=True, failure=DIES.failure)
    monkeypatch.setattr(build, "probe_wheel", lambda *_: dies)
    with pytest.raises(RuntimeUnavailableError, match=f"{NAME} does not work here: .*SIGILL"):
        build.wheel_from(wheel(tmp_path), Lines())


@pytest.mark.skipif(os.name == "nt", reason="CDLL(None) is a thing of POSIX")
def test_a_wheel_that_says_that_it_is_patched_and_is_not_is_refused(tmp_path: Path) -> None:
    package = fake_llama_cpp(tmp_path, VERSION) / "llama_cpp"
    path = wheel(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        for file in package.iterdir():
            archive.write(file, f"llama_cpp/{file.name}")
        archive.writestr(f"llama_cpp/{source.RECORD}", OURS)
    with pytest.raises(RuntimeUnavailableError, match=r"does not work here: .*lacks the patch"):
        build.wheel_from(path, Lines())


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The wheels that the command installs, in an environment without a compiler."""
    installed: list[Path] = []
    described = {"version": VERSION, "patch_version": bindings.PATCH_VERSION, "location": "site"}
    works = probe.ProbeResult(described, works=True, died=False, failure="")

    def build_wheel(*_: Any, **__: Any) -> build.Wheel:
        raise RuntimeUnavailableError("no C++ compiler")

    monkeypatch.setattr(build, "build_wheel", build_wheel)
    monkeypatch.setattr(build, "probe_wheel", lambda *_: works)
    monkeypatch.setattr(build, "install", installed.append)
    monkeypatch.setattr(status_module, "status", lambda: status_module.from_probe(works))
    return installed


def test_the_command_installs_a_matching_wheel_without_a_compiler(
    tmp_path: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wheel(tmp_path)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    for given in (path, tmp_path):
        result = CliRunner().invoke(main, ["runtime", "build", "--wheel", str(given), "--quiet"])
        assert (result.exit_code, installs.pop()) == (0, path)
        assert result.stdout.splitlines()[0] == f"wheel: {path}"
    checked = CliRunner().invoke(main, ["runtime", "build", "--wheel", str(path), "--no-install"])
    assert (checked.exit_code, installs) == (0, [])


def test_the_command_installs_no_other_wheel_and_does_not_compile_instead(
    tmp_path: Path, installs: list[Path]
) -> None:
    result = CliRunner().invoke(main, ["runtime", "build", "--wheel", str(wheel(tmp_path, record=OTHERS))])
    assert (result.exit_code, result.stdout, installs) == (1, "", [])
    assert "other patches" in result.stderr


@pytest.mark.parametrize("option", [["--rpc"], ["--rebuild"], ["--cmake-args", "-DGGML_CUDA=on"]])
def test_options_of_the_compilation_are_refused_beside_a_wheel(
    tmp_path: Path, installs: list[Path], option: list[str]
) -> None:
    result = CliRunner().invoke(main, ["runtime", "build", "--wheel", str(wheel(tmp_path)), *option])
    assert (result.exit_code, installs) == (2, [])
    assert "--wheel compiles nothing" in result.stderr
