"""A public name of the package stands for one thing: what is defined twice is listed here with its reason."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import alignez_gguf

ROOT = Path(alignez_gguf.__file__).parent

DEFINED_ONCE_PER_MODULE = {
    "fit": "the interface of a direction method, and the gate's; `directions.fit` chooses the method",
    "write": "the interface of an export format; `exporters.write` chooses the format",
}


def public_definitions() -> Iterator[tuple[str, str]]:
    """Yield the name and the module of every public class and function at the top level of a module.

    A command of the command line has the name of its module and of the function that it calls, and is left
    out.
    """
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not node.name.startswith("_") and module != f"cli.{node.name}":
                yield node.name, module


def test_every_public_name_is_defined_in_one_module() -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for name, module in public_definitions():
        modules[name].append(module)
    several = {name: found for name, found in modules.items() if len(found) > 1}
    allowed = DEFINED_ONCE_PER_MODULE.keys()
    assert {name: found for name, found in several.items() if name not in allowed} == {}
    assert allowed - several.keys() == set(), "allowed, but defined in one module only: take it off the list"
