"""Commands work without the extras that they do not need, and name the one that they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignez_gguf import demo
from alignez_gguf.errors import MissingExtraError, require_extra

OPTIONAL = {
    "serve": ("fastapi", "h11", "prometheus_client", "pydantic", "starlette", "uvicorn"),
    "report": ("matplotlib",),
    "transformers": ("accelerate", "transformers"),
    "datasets": ("datasets", "pyarrow"),
}
"""The modules that each extra alone brings."""

# httpcore2, a dependency of the base package, imports h11 itself.
_REFUSED = sorted({module for modules in OPTIONAL.values() for module in modules} - {"h11"})
_REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_REFUSED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def without_extras(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line where the modules of the extras cannot be imported."""
    program = f"{_REFUSE}\nfrom alignez_gguf.cli import main\nmain({arguments!r}, prog_name='alignez-gguf')"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("command", ["export", "chat", "generate", "evaluate", "serve"])
def test_help_needs_no_extra(command: str, tmp_path: Path) -> None:
    done = without_extras([command, "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"alignez-gguf {command}" in done.stdout


def test_generate_completes_without_extras(tmp_path: Path) -> None:
    done = without_extras(["generate", str(demo.MODEL), "-p", "Hi", "--max-tokens", "3", "--quiet"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "completion" in json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["serve", "model.gguf"],
            "Error: the server needs uvicorn; run: pip install 'alignez-gguf[serve]'",
        ),
        (
            ["evaluate", "--base", "m.gguf", "-c", "c.gguf", "-q", "default", "-o", "r.html"],
            "Error: the report of an evaluation needs matplotlib; run: pip install 'alignez-gguf[report]'",
        ),
        (
            ["export", "org/model", "-q", "demo", "-o", "c.gguf", "--quiet"],
            "Error: a model that is no GGUF file needs transformers; "
            "run: pip install 'alignez-gguf[transformers]'",
        ),
        (
            ["export", "model.gguf", "-q", "queries.parquet", "-o", "c.gguf"],
            "Error: reading queries.parquet needs pyarrow; run: pip install 'alignez-gguf[datasets]', "
            "or give a .csv or .jsonl",
        ),
    ],
    ids=["serve", "report", "transformers", "datasets"],
)
def test_missing_extra_is_one_line_that_names_it(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "queries.parquet").write_bytes(b"PAR1")
    done = without_extras(arguments, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == message


def test_package_that_is_there_and_broken_says_why() -> None:
    message = r"needs uvicorn \(cannot load it\); run: pip install"
    with pytest.raises(MissingExtraError, match=message), require_extra("serve", "the server"):
        raise ImportError("cannot load it", name="uvicorn.main")


def test_missing_module_of_this_package_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError), require_extra("serve", "the server"):
        import alignez_gguf.no_such_module  # type: ignore[import-not-found] # noqa: F401


def test_steer_imports_neither_torch_nor_scikit_learn_nor_a_web_framework() -> None:
    heavy = ("torch", "sklearn", "scipy", "transformers", "anyio", "httpx2", *_REFUSED)
    program = f"import sys\nfrom alignez_gguf import steer\nprint(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
