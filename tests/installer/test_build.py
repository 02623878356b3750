"""The build of the patched llama-cpp-python, without a compilation and without a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from alignez_gguf.cli import main
from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import build, probe, source, status
from alignez_gguf.installer.build import run_logged
from alignez_gguf.installer.cpu_flags import attempts, cpu_flags
from alignez_gguf.runtime import bindings
from alignez_gguf.runtime.version import SDIST_SHA256, VERSION

HEADER = "int first;\nint second;\nint third;\n"
PATCH = """\
diff --git a/include/llama.h b/include/llama.h
--- a/include/llama.h
+++ b/include/llama.h
@@ -1,3 +1,3 @@
 int first;
-int second;
+int edited;
 int third;
"""
AVX2 = frozenset({"sse4_2", "avx", "avx2", "bmi2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw", "avx512_vnni", "avx512vbmi"}
WORKS = probe.ProbeResult({}, works=True, died=False, failure="")
DIES = probe.ProbeResult({}, works=False, died=True, failure="a quantized matrix product dies with SIGILL")


class Lines:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, fraction: float) -> None:
        pass


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree of one header, and an empty cache."""
    tree = tmp_path / "tree"
    llama_cpp = tree / "vendor" / "llama.cpp"
    (llama_cpp / "include").mkdir(parents=True)
    (llama_cpp / "CMakeLists.txt").touch()
    (tree / "CMakeLists.txt").touch()
    (llama_cpp / "include" / "llama.h").write_text(HEADER)
    (tree / "llama_cpp").mkdir()
    (tree / "llama_cpp" / "__init__.py").write_text('__version__ = "0.3.36"\n')
    monkeypatch.setenv("ALIGNEZ_SOURCE_TREE", str(tree))
    monkeypatch.setenv("ALIGNEZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return tree


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "0001-edit.patch"
    path.write_text(PATCH)
    return path


class Compiler:
    """Stands in for the compilation and the probe: keeps the flags, and works from build `n_dead` on."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, n_dead: int = 0, failure: probe.ProbeResult = DIES
    ) -> None:
        self.built: list[tuple[str, ...]] = []
        self.n_dead, self.failure = n_dead, failure
        monkeypatch.setattr(build, "_compile", self._compile)
        monkeypatch.setattr(build, "probe_wheel", self._probe)
        monkeypatch.setattr(build, "cpu_flags", lambda: AVX512)

    def _compile(
        self, tree: Path, args: tuple[str, ...], work: Path, log: Path, observer: Lines, tag: str
    ) -> Path:
        assert "edited" in (tree / "vendor" / "llama.cpp" / "include" / "llama.h").read_text()
        self.built.append(tuple(args))
        wheel = work / "llama_cpp_python-0.3.36-py3-none-any.whl"
        wheel.write_bytes(b"wheel")
        return wheel

    def _probe(self, wheel: Path, folder: Path) -> probe.ProbeResult:
        return self.failure if len(self.built) <= self.n_dead else WORKS


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_a_patch_changes_the_copy_also_inside_a_git_repository(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    subprocess.run(["git", "init", "--quiet", str(tree.parent)], check=True)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if name == tool else None)
    source.apply_patches(tree, [patch])
    assert "int edited;" in (tree / "vendor" / "llama.cpp" / "include" / "llama.h").read_text()


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_a_patch_that_does_not_apply_is_an_error_that_names_version_and_file(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    (tree / "vendor" / "llama.cpp" / "include" / "llama.h").write_text("int other;\n")
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if name == tool else None)
    with pytest.raises(
        RuntimeUnavailableError, match=r"0001-edit\.patch .*0\.3\.36.*include/llama\.h"
    ) as error:
        source.apply_patches(tree, [patch])
    assert "\n" not in str(error.value)


def test_a_failed_build_leaves_nothing_behind(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Compiler(monkeypatch)
    patch.write_text(PATCH.replace("int second", "int absent"))
    with pytest.raises(RuntimeUnavailableError):
        build.build_wheel(Lines(), [], patches=[patch])
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []


def test_a_named_tree_that_is_no_source_distribution_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNEZ_SOURCE_TREE", str(tmp_path))
    with pytest.raises(RuntimeUnavailableError, match="not an unpacked source distribution"):
        source.source_tree()


def test_an_archive_with_another_checksum_is_refused_and_not_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("llama_cpp_python-0.3.36/setup.py"), io.BytesIO())
    with pytest.raises(RuntimeUnavailableError, match=SDIST_SHA256):
        source.unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_download_with_another_checksum_stops_the_build_before_anything_of_it_runs(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By pip itself, which would run the build backend that the archive brings, for its metadata."""
    ran = tmp_path / "ran"
    (tree / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
    )
    (tree / "backend.py").write_text(f"open({str(ran)!r}, 'w')\n")
    archive = tmp_path / "index" / f"llama_cpp_python-{VERSION}.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, arcname=f"llama_cpp_python-{VERSION}")
    compiler = Compiler(monkeypatch)
    monkeypatch.delenv("ALIGNEZ_SOURCE_TREE")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", archive.parent), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", str(value))

    result = CliRunner(catch_exceptions=False).invoke(main, ["runtime", "build", "--no-install"])

    assert (result.exit_code, result.stdout, compiler.built, ran.exists()) == (1, "", [], False)
    *_, last = result.stderr.splitlines()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f"has SHA-256 {found}, not {SDIST_SHA256}" in last
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path for path in left if path.name != "lock" and path.suffix != ".lock"] == []


def test_the_second_build_comes_from_the_cache(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(monkeypatch)
    first = build.build_wheel(Lines(), ["-DGGML_RPC=ON"], patches=[patch])
    second = build.build_wheel(Lines(), ["-DGGML_RPC=ON"], patches=[patch])
    assert (first.cached, second.cached, second.path) == (False, True, first.path)
    assert second.path.read_bytes() == b"wheel"
    assert len(compiler.built) == 1
    build.build_wheel(Lines(), ["-DGGML_RPC=ON"], patches=[patch], rebuild=True)
    assert len(compiler.built) == 2


def test_other_flags_another_patch_or_another_compiler_flag_are_another_build(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Compiler(monkeypatch)
    paths = [build.build_wheel(Lines(), args, patches=[patch]).path for args in ([], ["-DGGML_RPC=ON"])]
    monkeypatch.setenv("CXXFLAGS", "-O1")
    paths.append(build.build_wheel(Lines(), [], patches=[patch]).path)
    patch.write_text(PATCH.replace("edited", "edited_again"))
    paths.append(build.build_wheel(Lines(), [], patches=[patch]).path)
    assert len(set(paths)) == 4


def test_cmake_args_of_the_environment_reach_the_build(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(monkeypatch)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on '-DCMAKE_CXX_FLAGS=-O2 -g'")
    build.build_wheel(Lines(), patches=[patch])
    assert compiler.built == [("-DGGML_CUDA=on", "-DCMAKE_CXX_FLAGS=-O2 -g")]


def test_a_library_that_dies_is_built_again_with_other_flags_and_that_is_said(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, observer = Compiler(monkeypatch, n_dead=1), Lines()
    wheel = build.build_wheel(observer, ["-DGGML_RPC=ON"], patches=[patch])
    assert compiler.built[0] == ("-DGGML_RPC=ON",)
    assert wheel.cmake_args == compiler.built[1]
    assert {"-DGGML_RPC=ON", "-DGGML_NATIVE=OFF", "-DGGML_AVX512=ON"} <= set(wheel.cmake_args)
    assert wheel.reason
    assert any("SIGILL" in line and "again" in line for line in observer.lines)


def test_what_died_on_this_machine_is_not_tried_again_for_another_patch(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(monkeypatch, n_dead=1)
    first = build.build_wheel(Lines(), [], patches=[patch])
    patch.write_text(PATCH.replace("edited", "edited_again"))
    second = build.build_wheel(Lines(), [], patches=[patch])
    assert len(compiler.built) == 3
    assert second.cmake_args == first.cmake_args == compiler.built[2]


def test_when_every_library_dies_the_error_names_the_mend(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(monkeypatch, n_dead=9)
    with pytest.raises(RuntimeUnavailableError, match="CMAKE_ARGS"):
        build.build_wheel(Lines(), [], patches=[patch])
    assert len(compiler.built) == len(set(compiler.built)) == 3


def test_a_library_that_fails_without_dying_is_not_built_again(
    tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = probe.ProbeResult({}, works=False, died=False, failure="OSError: libcudart.so.12: no such file")
    compiler = Compiler(monkeypatch, n_dead=9, failure=failure)
    with pytest.raises(RuntimeUnavailableError, match="libcudart"):
        build.build_wheel(Lines(), [], patches=[patch])
    assert len(compiler.built) == 1


def test_a_missing_compiler_is_named(tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeUnavailableError, match="no C\\+\\+ compiler \\(no-such-compiler\\)"):
        build.build_wheel(Lines(), [], patches=[patch])


def test_avx512_fp16_is_not_used_and_amx_is_the_next_to_be_done_without() -> None:
    flags = AVX512 | {"avx512_fp16", "amx_tile", "amx_int8"}
    first, without_amx, without_avx512 = attempts([], flags)
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512_VNNI=ON", "-DGGML_AMX_INT8=ON"} <= set(first.cmake_args)
    assert "AVX512-FP16" in first.reason
    assert {"-DGGML_AVX512_VNNI=ON", "-DGGML_AMX_TILE=OFF", "-DGGML_AMX_INT8=OFF"} <= set(
        without_amx.cmake_args
    )
    assert {"-DGGML_AVX512_VNNI=OFF", "-DGGML_AMX_INT8=OFF"} <= set(without_avx512.cmake_args)
    assert attempts(["-DGGML_NATIVE=ON"], flags)[0].cmake_args == ("-DGGML_NATIVE=ON",)


def test_flags_never_name_what_the_cpu_lacks() -> None:
    avx2_only = attempts([], AVX2)
    assert len(avx2_only) == 2
    assert not [flag for flag in avx2_only[1].cmake_args if "AVX512" in flag and flag.endswith("=ON")]
    assert "-DGGML_AVX512_BF16=OFF" in attempts([], AVX512)[1].cmake_args
    assert attempts([], frozenset())[1].cmake_args == ("-DGGML_NATIVE=OFF",)


def test_cpu_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_int8\nbugs\t\t: none\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "amx_int8"}
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_the_probe_tells_death_from_failure_and_from_wrong_numbers() -> None:
    described = json.dumps({"version": "0.3.36"}) + "\n"
    died = probe.interpret(-4, described, "")
    assert (died.works, died.died) == (False, True)
    assert "SIGILL" in died.failure
    failed = probe.interpret(1, "", "Traceback\nModuleNotFoundError: No module named 'llama_cpp'\n")
    assert (failed.works, failed.died) == (False, False)
    assert "No module named" in failed.failure
    wrong = probe.interpret(0, described + '{"finite": false}\n', "")
    assert (wrong.works, wrong.died) == (False, False)
    assert probe.interpret(0, described + '{"finite": true}\n', "").works


def test_the_installed_library_computes_with_quantized_weights() -> None:
    found = probe.run()
    assert found.works, found.failure
    assert found.description["version"] == VERSION
    assert any(device["name"] == "CPU" for device in found.description["devices"])


def fake_llama_cpp(folder: Path, version: str, body: str = "") -> Path:
    """A llama_cpp package whose library is the C library: it loads, and has no patched function."""
    package = folder / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n{body}')
    (package / "llama_cpp.py").write_text(
        "import ctypes\n_lib = ctypes.CDLL(None)\n"
        "def llama_print_system_info():\n    return b'CPU : NONE = 1'\n"
        "def llama_backend_init():\n    import os, signal\n    os.kill(os.getpid(), signal.SIGILL)\n"
    )
    return folder


@pytest.mark.skipif(os.name == "nt", reason="CDLL(None) is a thing of POSIX")
def test_status_of_an_unpatched_library_that_dies_says_both_and_the_mend(tmp_path: Path) -> None:
    found = status.status(fake_llama_cpp(tmp_path, VERSION))
    assert (found.version, found.patched, found.quantized_products) == (VERSION, False, False)
    assert found.location == str(tmp_path / "llama_cpp")
    assert found.system_info == "CPU : NONE = 1"
    assert "lacks the patch" in found.mend
    assert "alignez-gguf runtime build" in found.mend


def test_status_names_a_package_that_does_not_load_or_has_another_version(tmp_path: Path) -> None:
    broken = fake_llama_cpp(tmp_path, "0.1", "raise OSError('libllama.so: no such file')\n")
    found = status.status(broken)
    assert found.version is None
    assert "libllama.so: no such file" in found.mend
    other = status.from_probe(probe.ProbeResult({"version": "0.3.9", "patch_version": None}, True, False, ""))
    assert "0.3.9" in other.mend
    assert VERSION in other.mend


def test_runtime_status_prints_json_and_exits_1_when_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = {
        "version": VERSION,
        "patch_version": None,
        "devices": [{"name": "CPU", "description": "x"}],
    }
    monkeypatch.setattr(probe, "run", lambda site: probe.ProbeResult(description, True, False, ""))
    result = CliRunner().invoke(main, ["runtime", "status", "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["devices"] == [{"name": "CPU", "description": "x"}]
    assert document["patched"] is False
    description["patch_version"] = bindings.PATCH_VERSION
    assert CliRunner().invoke(main, ["runtime", "status"]).exit_code == 0


def test_an_externally_managed_interpreter_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(RuntimeUnavailableError, match="virtual environment"):
        build.install(tmp_path / "any.whl")


@pytest.mark.skipif(os.name == "nt", reason="process groups are a thing of POSIX")
def test_an_interrupted_process_takes_its_children_along(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    fifo = tmp_path / "held-open-by-all-of-them"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = f"exec 3>'{fifo}'; sleep 60 & echo started; wait"
    with pytest.raises(KeyboardInterrupt):
        run_logged(["sh", "-c", script], os.environ, tmp_path / "log", interrupt)
    deadline = time.monotonic() + 5
    while not _is_closed(reader) and time.monotonic() < deadline:
        time.sleep(0.05)
    closed = _is_closed(reader)
    os.close(reader)
    assert closed


def _is_closed(reader: int) -> bool:
    """Whether no process has the other end of a FIFO open."""
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


def test_the_library_is_built_with_the_patches_that_it_needs() -> None:
    files = {
        programs: [path.name for path in source.patch_files(programs=programs)] for programs in (False, True)
    }
    assert [name[:4] for name in files[True]] == ["0001", "0002", "0003", "0004"]
    assert [name[:4] for name in files[False]] == ["0001", "0004"]


FOLDERS = {
    "0001": ("include/", "src/", "tests/"),
    "0002": ("common/",),
    "0003": ("tools/server/",),
    "0004": ("ggml/",),
}


@pytest.mark.parametrize("number", FOLDERS)
def test_each_patch_changes_one_part_of_llama_cpp(number: str) -> None:
    (patch,) = (path for path in source.patch_files(programs=True) if path.name.startswith(number))
    changed = re.findall(r"^diff --git a/(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE)
    assert changed
    assert all(name.startswith(FOLDERS[number]) for name in changed)
