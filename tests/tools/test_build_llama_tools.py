"""`tools/build_llama_tools.py`, with a cmake that compiles nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from alignez_gguf.installer import build, source
from alignez_gguf.installer.build import share_compiled

FAKE_CMAKE = """\
#!{python}
import sys
from pathlib import Path
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*arguments, file=log)
if "--build" in arguments:
    print("[1/2] compiling")
    bin = Path(arguments[arguments.index("--build") + 1]) / "bin"
    bin.mkdir(parents=True, exist_ok=True)
    for program in arguments[arguments.index("--target") + 1 :]:
        if program == "broken":
            sys.exit("x.cpp:1: error: expected ;")
        (bin / program).write_text("new")
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for cmake is a script with a #! line")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, over a source of one file; what cmake was asked for is in `cmake.log`."""
    (tmp_path / "tree" / "vendor" / "llama.cpp").mkdir(parents=True)
    (tmp_path / "tree" / "vendor" / "llama.cpp" / "CMakeLists.txt").touch()
    programs = tmp_path / "path"
    programs.mkdir()
    cmake = programs / "cmake"
    cmake.write_text(FAKE_CMAKE.format(python=sys.executable, log=str(tmp_path / "cmake.log")))
    cmake.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("ALIGNEZ_SOURCE_TREE", str(tmp_path / "tree"))
    monkeypatch.setenv("ALIGNEZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "patch_files", lambda *, programs: [])
    wheel = build.Wheel(Path("x.whl"), ("-DGGML_NATIVE=OFF",), "", cached=True)
    monkeypatch.setattr(build, "build_wheel", lambda observer: wheel)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import build_llama_tools

    return build_llama_tools


def test_programs_are_built_with_the_flags_of_the_runtime_and_put_into_the_folder(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bin"
    output.mkdir()
    (output / "llama-server").write_text("old")

    assert tool.main(["llama-server", "ggml-rpc-server", "--output", str(output), "--quiet"]) == 0

    configure, compile_it = (tmp_path / "cmake.log").read_text().splitlines()
    assert {"-DGGML_NATIVE=OFF", "-DGGML_RPC=ON", "-DBUILD_SHARED_LIBS=OFF"} <= set(configure.split())
    assert compile_it.endswith("--target llama-server ggml-rpc-server")
    assert capsys.readouterr().out.split() == [
        str(output / "llama-server"),
        str(output / "ggml-rpc-server"),
    ]
    assert {path.name: path.read_text() for path in output.iterdir()} == {
        "llama-server": "new",
        "ggml-rpc-server": "new",
    }


def test_a_compilation_that_fails_is_one_line_and_puts_nothing_into_the_folder(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["broken", "--output", str(tmp_path / "bin"), "--quiet"]) == 1

    error = capsys.readouterr().err
    assert error.startswith("Error: compiling failed: x.cpp:1: error: expected ;; see ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("[30/120] Building CXX object x.o", 0.25),
        ("[ 40%] Building CXX object x.o", 0.4),
        ("-- Configuring done", None),
        ("x.cpp:3:[1] note", None),
    ],
)
def test_the_share_that_is_compiled_is_read_from_ninja_and_make(line: str, share: float | None) -> None:
    assert share_compiled(line) == share
