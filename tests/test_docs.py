"""The documentation holds: its Python runs, its commands have these options, its links lead somewhere.

The Python runs over a tiny model under the names that the pages use. Commands are parsed, not run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest

from alignez_gguf import ControlFile, LayerEdit, ModelInfo
from alignez_gguf.cli import main
from alignez_gguf.server.service import Service
from tests.models import TinyModel, tiny_model, tokenizer
from tests.server.client import serving

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("patches/*.md")])
MODEL, CONTROL, DIRECTORY, ADDRESS = "model-Q4_K_M.gguf", "safe.gguf", "model-fp16", "127.0.0.1:8080"


class Snippet(NamedTuple):
    page: str
    text: str


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page, each with its language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> Iterator[str]:
    """Return the commands behind a `$` in console blocks, and indented lines that begin with our programs."""
    for language, block in _blocks(page):
        if language == "console":
            yield from re.findall(r"^\$ ((?:[^\n]|\\\n)+)", block, re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"^ {4}((?:python3 tools/|alignez-gguf )[^\n]+)", text, re.MULTILINE)


PYTHON = [Snippet(_name(page), code) for page in PAGES for kind, code in _blocks(page) if kind == "python"]
COMMANDS = [Snippet(_name(page), command) for page in PAGES for command in _commands(page)]
OURS = [snippet for snippet in COMMANDS if snippet.text.startswith("alignez-gguf ")]
TOOLS = [snippet for snippet in COMMANDS if snippet.text.startswith("python3 ")]
LINKS = [
    Snippet(_name(page), link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    if "://" not in link
]
PATHS = [
    Snippet(_name(page), path)
    for page in PAGES
    for path in re.findall(
        r"`((?:alignez_gguf|docs|patches|tests|tools)/[\w./-]+)", page.read_text(encoding="utf-8")
    )
]


def _id(snippet: Snippet) -> str:
    return f"{snippet.page}: {snippet.text.strip().splitlines()[0]}"


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def control(tiny: TinyModel) -> ControlFile:
    info = ModelInfo.from_gguf(tiny.gguf)
    return ControlFile(info, {1: LayerEdit(remove=np.random.default_rng(0).standard_normal(info.n_embd))})


@pytest.fixture
def files(tiny: TinyModel, control: ControlFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the pages speak of, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path(MODEL).symlink_to(tiny.gguf)
    control.save(CONTROL)


@pytest.fixture
def address(tiny: TinyModel, control: ControlFile) -> Iterator[str]:
    name = MODEL.removesuffix(".gguf")
    service = Service(tiny.gguf, {"safe": control}, name=name, n_ctx=512, n_parallel=2, n_threads=1)
    with serving(service) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/serve.md"])
def test_page_shows_python(page: str) -> None:
    assert page in {snippet.page for snippet in PYTHON}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("snippet", PYTHON, ids=_id)
def test_python_runs(
    snippet: Snippet, tiny: TinyModel, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    page, code = snippet
    if ADDRESS in code:
        code = code.replace(ADDRESS, request.getfixturevalue("address"))
    if DIRECTORY in code:
        tiny.hf.save_pretrained(DIRECTORY)
        tokenizer().save_pretrained(DIRECTORY)
    exec(compile(code, page, "exec"), {"__name__": "__docs__"})
    assert "print(" not in code or capsys.readouterr().out


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("export", "serve", "formats"))]
)
def test_page_shows_commands(page: str) -> None:
    assert page in {snippet.page for snippet in OURS}


@pytest.mark.parametrize("snippet", OURS, ids=_id)
def test_command_has_these_options(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignez_gguf.runtime.rpc.use_servers", lambda endpoints: None)
    program, *arguments = shlex.split(snippet.text, comments=True)
    command: click.Command = main
    context = click.Context(
        main, info_name=program, **main.context_settings
    )  # a command keeps its help option
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.make_context(context.info_name, arguments, parent=context.parent)


@pytest.mark.parametrize("snippet", TOOLS, ids=_id)
def test_tool_has_these_options(snippet: Snippet) -> None:
    _, script, *arguments = shlex.split(snippet.text, comments=True)
    source = (ROOT / script).read_text(encoding="utf-8")
    if script == "tools/test.py":  # hands them to pytest
        return
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in source


def test_makefile_runs_tools_that_exist() -> None:
    recipes = re.findall(r"^\t(.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    scripts = [recipe.split()[1] for recipe in recipes]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("snippet", PATHS, ids=_id)
def test_path_is_there(snippet: Snippet) -> None:
    """A path names a file of this repository; a name in capitals stands for one that a reader writes."""
    assert (ROOT / snippet.text).exists() or "NAME" in snippet.text


@pytest.mark.parametrize("snippet", LINKS, ids=_id)
def test_link_leads_somewhere(snippet: Snippet) -> None:
    path, _, anchor = snippet.text.partition("#")
    page = ROOT / snippet.page
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {_anchor(heading) for heading in headings}


def test_readme_has_the_figures_of_the_real_model() -> None:
    real = (ROOT / "docs" / "real-models.md").read_text(encoding="utf-8")
    section = real.partition("<!-- qwen2.5-coder-1.5b transcript -->")[2].partition("<!-- end -->")[0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    percent = r"(\d+)%[^|]*\| "
    for system, name in (("base", "base"), ("steered", "steered"), ("persona", "persona as a plain prompt")):
        rows = re.findall(
            rf"^\| {system} \| ([\w ]+) \| 60 \| {percent}{percent}(\d+)%", section, re.MULTILINE
        )
        refused = {row[0]: round(0.6 * int(row[1])) for row in rows}
        fluent = sum(round(0.6 * int(row[3])) for row in rows)
        counts = (
            (refused["XSTest unsafe"] + refused["JailbreakBench"], 120),
            (refused["XSTest safe"], 60),
            (fluent, 180),
        )
        cells = " | ".join(f"{(200 * count + n) // (2 * n)}%" for count, n in counts)
        assert f"| {name} | {cells} |" in readme


def _anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
