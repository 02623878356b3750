"""The build for every CPU of a platform: its flags, what it records, and how its backends are loaded."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import build, probe, source, status
from alignez_gguf.installer.cpu_flags import VARIANTS, portable_flags
from alignez_gguf.runtime import bindings as library
from alignez_gguf.runtime.version import VERSION
from tests.installer.test_build import Compiler, Lines, patch, tree

__all__ = ["patch", "tree"]  # fixtures


def test_a_build_records_its_patches_where_the_probe_finds_them(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source.record_patches(tree, [patch])
    assert source.recorded_patches(tree) == source.patches_digest([patch])
    patch.write_bytes(patch.read_bytes().replace(b"\n", b"\r\n"))  # as git writes it on Windows
    assert source.recorded_patches(tree) == source.patches_digest([patch])
    patch.write_text(patch.read_text().replace("edited", "edited_again"))
    assert source.recorded_patches(tree) != source.patches_digest([patch])


class PortableCompiler(Compiler):
    """Keeps the bindings, which patches the tree says it has, and the build tag."""

    def _compile(
        self, tree: Path, args: tuple[str, ...], work: Path, log: Path, observer: Lines, tag: str
    ) -> Path:
        self.tag = tag
        self.bindings = (tree / "llama_cpp" / "llama_cpp.py").read_text()
        self.patches = source.recorded_patches(tree)
        return super()._compile(tree, args, work, log, observer, tag)


def test_a_portable_build_has_every_variant_and_loads_them_and_is_another_build(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings = tree / "llama_cpp" / "llama_cpp.py"
    bindings.write_text("a = 1\n_lib = load_shared_library(_lib_base_name, _base_path)\nb = 2\n")
    compiler = PortableCompiler(monkeypatch)
    native = build.build_wheel(Lines(), [], patches=[patch])
    assert (compiler.bindings, compiler.patches) == (bindings.read_text(), source.patches_digest([patch]))
    assert compiler.tag == ""
    monkeypatch.setattr(build, "portable_flags", lambda: VARIANTS)
    portable = build.build_wheel(Lines(), ["-DA=B"], patches=[patch], portable=True)
    assert compiler.built[-1] == ("-DA=B", *VARIANTS)
    assert compiler.bindings.endswith("\n_load_backends()\nb = 2\n")
    assert compiler.tag == f"1p{source.patches_digest([patch])}"
    assert portable.path != native.path
    assert build.build_wheel(Lines(), ["-DA=B"], patches=[patch], portable=True).cached

    bindings.write_text("_lib = something_else()\n")
    with pytest.raises(RuntimeUnavailableError, match=r"llama_cpp\.py is not that of version"):
        build.build_wheel(Lines(), [], patches=[patch], portable=True)


def test_a_portable_build_that_dies_is_not_built_again_for_this_machine(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "llama_cpp" / "llama_cpp.py").write_text(source._LIBRARY_IS_LOADED)
    compiler = PortableCompiler(monkeypatch, n_dead=1)
    with pytest.raises(RuntimeUnavailableError, match="SIGILL"):
        build.build_wheel(Lines(), [], patches=[patch], portable=True)
    assert len(compiler.built) == 1


def test_macos_has_one_backend_and_no_build_is_for_the_cpu_at_hand() -> None:
    assert portable_flags("darwin") == ("-DGGML_NATIVE=OFF",)
    for platform in ("linux", "win32"):
        assert {"-DGGML_NATIVE=OFF", "-DGGML_CPU_ALL_VARIANTS=ON"} <= set(portable_flags(platform))


def test_the_bindings_load_libllama_at_one_place() -> None:
    from llama_cpp import llama_cpp as bindings

    assert Path(bindings.__file__).read_text(encoding="utf-8").count(source._LIBRARY_IS_LOADED) == 1


class Function(SimpleNamespace):
    """A function of a library, which takes attributes such as `restype`."""

    def __call__(self, *arguments: Any) -> Any:
        return self.does(*arguments)


class Libraries:
    """A libllama, and a libggml that finds a CPU backend or none; keeps what they are asked to do."""

    def __init__(self, cpu: int | None, *, passes_symbols_on: bool = True) -> None:
        self.calls: list[Any] = []
        log = {
            "llama_log_set": lambda callback, _: self.calls.append("log" if callback is None else "silence")
        }
        backends = {
            "ggml_backend_load_all_from_path": self.calls.append,
            "ggml_backend_dev_by_type": Function(does=lambda kind: cpu),
        }
        self.ggml = SimpleNamespace(**backends)
        self.llama = SimpleNamespace(**log, **(backends if passes_symbols_on else {}))

    def load(self, folder: Path) -> None:
        names = {"_lib": self.llama, "_base_path": folder, "load_shared_library": lambda *_: self.ggml}
        exec(source._LOAD_BACKENDS, {"os": os, "ctypes": ctypes, **names})


@pytest.mark.parametrize("passes_symbols_on", [True, False])
def test_backends_are_loaded_from_the_folder_of_the_library_and_silently(
    tmp_path: Path, passes_symbols_on: bool
) -> None:
    libraries, folder = Libraries(cpu=1, passes_symbols_on=passes_symbols_on), tmp_path / "größe"
    libraries.load(folder)
    assert libraries.calls == ["silence", os.fsencode(folder), "log"]


def test_a_folder_without_a_backend_for_this_cpu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no CPU backend in"):
        Libraries(cpu=None).load(tmp_path)


def test_status_says_which_patches_and_refuses_others() -> None:
    described = {"version": VERSION, "patch_version": library.PATCH_VERSION}
    for record, mend in (
        (None, False),
        (source.patches_digest(source.patch_files()), False),
        ("0123456789ab", True),
    ):
        found = status.from_probe(probe.ProbeResult({**described, "patches": record}, True, False, ""))
        assert found.patches == record
        assert ("other patches" in found.mend) == bool(found.mend) == mend


def test_the_tool_builds_the_portable_wheel_and_copies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import build_wheel

    asked: list[dict[str, bool]] = []
    made = tmp_path / "llama_cpp_python.whl"
    made.write_bytes(b"wheel")

    def built(observer: object, **how: bool) -> build.Wheel:
        asked.append(how)
        return build.Wheel(made, (), "", cached=False)

    monkeypatch.setattr(build, "build_wheel", built)
    assert build_wheel.main(["--output", str(tmp_path / "dist")]) == 0
    assert asked == [{"portable": True, "rebuild": False}]
    assert capsys.readouterr().out.strip() == str(tmp_path / "dist" / made.name)
    assert (tmp_path / "dist" / made.name).read_bytes() == b"wheel"
