"""What the server says of itself in OpenAPI's words, and that it does as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.server.client import Server
from tests.server.conftest import Serve


@pytest.fixture(scope="module", params=[(), ("secret",)], ids=["open", "with a key"])
def described(request: pytest.FixtureRequest, serve: Serve) -> Iterator[tuple[Server, dict[str, str]]]:
    with serve(api_keys=request.param, max_tokens=4) as server:
        yield server, {"Authorization": f"Bearer {request.param[0]}"} if request.param else {}


Described = tuple[Server, dict[str, str]]


def test_description_names_the_model_the_controls_and_the_limits(described: Described) -> None:
    server, headers = described
    document = httpx.get(f"{server.url}/openapi.json", headers=headers).json()
    assert set(document["paths"]) == {
        "/health",
        "/metrics",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/steering",
        "/v1/chat/completions",
        "/v1/completions",
    }
    schemas = document["components"]["schemas"]
    assert schemas["ChatBody"]["properties"]["model"]["enum"] == ["demo"]
    assert schemas["SteeringFields"]["properties"]["control"]["enum"] == [None, "safe", "other"]
    assert {"type": "integer", "minimum": 1, "maximum": 4} in schemas["ChatBody"]["properties"]["max_tokens"][
        "anyOf"
    ]
    secured = {
        path for path, methods in document["paths"].items() if "security" in next(iter(methods.values()))
    }
    assert secured == (set(document["paths"]) - {"/health"} if headers else set())


def test_schemathesis_finds_nothing(serve: Serve, tmp_path: Path) -> None:
    """A few of its requests; `tools/fuzz/stress.py` sends more."""
    pytest.importorskip("schemathesis")
    with serve(api_keys=("secret",), max_tokens=4) as server:
        done = tried(server, tmp_path)
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) generated", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > 100


def tried(server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    # Whether messages are a conversation and fit into the context cannot be said in a schema.
    command += ["--exclude-checks", "positive_data_acceptance", "--phases", "coverage,fuzzing"]
    command += ["--max-examples", "3", "--seed", "0", "--no-color", "--generation-database", "none"]
    command += ["--header", "Authorization: Bearer secret"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)
