"""The command as a process of its own: how it starts, refuses to, and ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from click.testing import CliRunner

from alignez_gguf import demo
from alignez_gguf.cli import main
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.runtime import bindings
from alignez_gguf.server import run as serving
from alignez_gguf.server.run import listen
from tests.cli.conftest import PROGRAM, environment
from tests.models import OUT_OF_REACH, tiny_model

MODEL = str(demo.MODEL)


@contextmanager
def started(
    *arguments: str, model: str = MODEL, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    process = subprocess.Popen(
        [*PROGRAM, "serve", model, "--threads", "1", "--context", "512", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://\S+:\d+(?=,)", line)
        assert found, line + process.stderr.read()
        yield process, found[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_answers_end_and_takes_no_new_ones(
    number: signal.Signals, control_path: Path
) -> None:
    with started("-c", str(control_path)) as (process, url):
        body = {"model": "demo", "prompt": "x", "max_tokens": 400, "n": 8, "stream": True, "seed": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            said = [line for line in lines if line]
        assert sum('"finish_reason": "' in line for line in said) == 8
        assert said[-1] == "data: [DONE]"
        assert process.wait(timeout=30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_answers_that_take_longer_than_the_grace_are_cut_off() -> None:
    with started("--grace", "0", "--parallel", "2") as (process, url):
        body = {"model": "demo", "prompt": "x", "max_tokens": 500, "n": 200, "stream": True}
        said = []
        with (
            suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
        ):
            for line in response.iter_lines():
                if not said:
                    process.send_signal(signal.SIGTERM)
                said.append(line)
        assert said
        assert "data: [DONE]" not in said
        assert process.wait(timeout=30) == 0


def test_key_can_come_from_the_environment() -> None:
    with started(ALIGNEZ_API_KEY="secret") as (_, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        named = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})
        assert named.json()["data"][0]["id"] == "demo"
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("--host", "0.0.0.0"), 2, "--api-key"),
        (("--host", "::"), 2, "--api-key"),
        (("--host", "example.org"), 2, "--api-key"),
        (("--api-key", ""), 2, "must not be empty"),
        (("-c", "a=x.gguf", "-c", "a=y.gguf"), 2, "the same name"),
        (("-c", "missing.gguf"), 1, "missing.gguf"),
        (("--scope", "nothing"), 1, "scope"),
        (("--strength", "-1"), 1, "strength"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: tuple[str, ...], exit_code: int, said: str) -> None:
    result = CliRunner(catch_exceptions=False).invoke(
        main, ["serve", MODEL, "--port", "0", "--threads", "1", *arguments]
    )
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert said in result.stderr.splitlines()[-1]


@pytest.fixture
def edit_of_every_layer(tmp_path: Path) -> tuple[str, str]:
    """A model whose layers the patch does not reach, and a control file for it."""
    model = tiny_model(OUT_OF_REACH).gguf
    info = ModelInfo.from_gguf(model)
    edit = LayerEdit(remove=np.ones(info.n_embd))
    ControlFile(info, dict.fromkeys(range(info.n_layer), edit)).save(tmp_path / "control.gguf")
    return str(model), str(tmp_path / "control.gguf")


def test_control_that_cannot_be_applied_in_full_is_not_served_without(
    edit_of_every_layer: tuple[str, str], control_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, control = edit_of_every_layer
    monkeypatch.setattr(serving, "serve", lambda *_, **__: pytest.fail("it is served"))
    for arguments, said in (
        ((model, "-c", control), "out of reach"),
        ((MODEL, "-c", str(control_path), "-c", f"second={control}"), "is for"),
        ((MODEL, "-c", f"first={control}", "-c", str(control_path)), "is for"),
    ):
        result = CliRunner().invoke(main, ["serve", *arguments, "--port", "0", "--threads", "1"])
        assert (result.exit_code, result.stdout) == (1, "")
        assert said in result.stderr.splitlines()[-1]


def test_control_is_not_served_without_the_patch(control_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    monkeypatch.setattr(serving, "serve", lambda *_, **__: pytest.fail("it is served"))
    result = CliRunner().invoke(main, ["serve", MODEL, "-c", str(control_path), "--port", "0"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "alignez-gguf runtime build" in result.stderr


def test_tokens_are_sent_as_they_come() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            # asyncio switches Nagle's algorithm off for sockets that name their protocol.
            assert accepted.proto == socket.IPPROTO_TCP


def test_port_that_is_taken_is_an_error_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = CliRunner(catch_exceptions=False).invoke(
            main, ["serve", MODEL, "--port", str(other.getsockname()[1])]
        )
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "choose another --port" in result.stderr


def test_help_imports_no_web_framework() -> None:
    program = (
        "import sys; from alignez_gguf.cli import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "import json; json.dump(sorted(sys.modules), sys.stderr)"
    )
    done = subprocess.run([PROGRAM[0], "-c", program], capture_output=True, text=True, check=True)
    assert not {"fastapi", "uvicorn", "torch", "transformers", "llama_cpp"} & set(json.loads(done.stderr))
