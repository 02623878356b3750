"""The short form of `tools/fuzz/serving.py`, and that it notices what goes wrong."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def stress(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("fuzz.serving")


def test_good_and_bad_clients_find_nothing_to_complain_about(stress: Any, tmp_path: Path) -> None:
    scale = stress.Scale(inputs=0, kills=0, requests=100, cycles=0)
    with stress.serving(tmp_path) as server:
        outcome = stress.clients(server, scale)
        assert (outcome.tried, outcome.findings) == (100, ())
        assert "memory" in outcome.detail

        forgetful = stress.Client(server.port, {})
        assert "KeyError" in stress.send(forgetful, 0, 0)
        good = stress.Good.by_chance(random.Random("0/0"))
        mistaken = stress.Client(server.port, {good: "what it does not say"})
        assert "another answer than alone" in stress.send(mistaken, 0, 0)

        server.log.write_text(f"Traceback of {stress.KEY}", encoding="utf-8")
        assert len(stress.after(server, forgetful)) == 2
        server.process.terminate()
        server.process.wait()
        assert stress.after(server, forgetful) == [f"the server ended with {server.process.returncode}"]
        assert "ConnectError" in stress.send(stress.Client(server.port, {}), 0, 0)
