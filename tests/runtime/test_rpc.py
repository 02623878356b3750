"""Models over several machines: what is refused, and steering over two servers on this one.

The last needs a llama.cpp with RPC and a ggml-rpc-server: tools/build_llama_tools.py builds one, and
ALIGNEZ_RPC_SERVER names another.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from alignez_gguf.cli import main
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.installer import build
from alignez_gguf.runtime import rpc
from tests.models import quantized, tiny_model
from tests.runtime.context import Context, log_lines, rows

BUILT = Path(__file__).parents[2] / "build" / "llama.cpp" / "bin" / "ggml-rpc-server"
SERVER = Path(os.environ.get("ALIGNEZ_RPC_SERVER") or BUILT)
HAS_RPC = llama_cpp.llama_supports_rpc()
N_EMBD, N_LAYER = 256, 4
TOKENS = [int(token) for token in np.random.default_rng(0).integers(5, 370, 40)]
FLOOR = 5e-5


@contextmanager
def listener(reply: Callable[[socket.socket], None]) -> Iterator[str]:
    """The endpoint of a server that replies to one client."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as client:
                reply(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(5)


def speaks(major: int, minor: int) -> Callable[[socket.socket], None]:
    """The answer of a ggml-rpc-server to a greeting."""

    def reply(client: socket.socket) -> None:
        with client.makefile("rb") as received:
            assert received.read(33) == bytes([14]) + struct.pack("=Q", 24) + bytes(24)
        client.sendall(struct.pack("=QBBBB24x", 28, major, minor, 0, 0))

    return reply


def keeps_silent(client: socket.socket) -> None:
    client.settimeout(5)
    while client.recv(64):
        pass


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Endpoints that were handed to llama.cpp, which is not there."""
    servers: list[bytes] = []
    monkeypatch.setattr(rpc, "_functions", lambda: (lambda name: name, servers.append))
    monkeypatch.setattr(rpc, "_in_use", set())
    return servers


def test_servers_of_the_same_protocol_are_handed_over_once(registered: list[bytes]) -> None:
    with listener(speaks(*rpc.PROTOCOL)) as first, listener(speaks(*rpc.PROTOCOL)) as second:
        rpc.use_servers(f"{first}, {second}")
        rpc.use_servers([second])

    assert registered == [first.encode(), second.encode()]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (speaks(rpc.PROTOCOL[0] + 1, 0), "speaks version 8.0, not 7.0"),
        (speaks(rpc.PROTOCOL[0], rpc.PROTOCOL[1] + 1), "speaks version 7.1"),
        (lambda client: None, "there is no RPC server"),
    ],
    ids=["another major version", "a later minor version", "hanging up"],
)
def test_a_server_that_would_end_the_process_is_refused(
    reply: Callable[[socket.socket], None], message: str, registered: list[bytes]
) -> None:
    with listener(reply) as endpoint, pytest.raises(RuntimeUnavailableError, match=message) as refusal:
        rpc.use_servers(endpoint)

    assert endpoint in str(refusal.value)
    assert registered == []


def test_a_server_that_is_busy_with_another_client_is_refused(
    registered: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_TIMEOUT_S", 0.2)

    with (
        listener(keeps_silent) as endpoint,
        pytest.raises(RuntimeUnavailableError, match="one client at a time"),
    ):
        rpc.use_servers(endpoint)

    assert registered == []


def test_an_endpoint_where_nobody_listens_is_refused(registered: list[bytes]) -> None:
    with pytest.raises(RuntimeUnavailableError, match="start ggml-rpc-server there"):
        rpc.use_servers(f"127.0.0.1:{free_port()}")
    assert registered == []


@pytest.mark.parametrize("endpoint", ["", "localhost", "localhost:", ":50052", "host:0", "::1:50052", "a:b"])
def test_what_is_no_endpoint_is_refused(endpoint: str, registered: list[bytes]) -> None:
    with pytest.raises(RuntimeUnavailableError, match="write HOST:PORT"):
        rpc.use_servers([endpoint])
    assert registered == []


@pytest.mark.skipif(HAS_RPC, reason="this llama.cpp has RPC")
def test_a_library_without_rpc_is_refused_with_the_mend() -> None:
    with pytest.raises(RuntimeUnavailableError, match="alignez-gguf runtime build --rpc"):
        rpc.use_servers("127.0.0.1:50052")


@pytest.mark.parametrize("command", ["chat", "generate", "serve", "export"])
def test_commands_hand_their_servers_over_before_anything_is_loaded(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[str] = []
    monkeypatch.setattr(rpc, "use_servers", given.append)
    required = {"generate": ["-p", "x"], "export": ["-q", "default", "-o", str(tmp_path / "out.gguf")]}

    result = CliRunner().invoke(
        main, [command, str(tmp_path / "missing.gguf"), "--rpc", "a:1,b:2", *required.get(command, [])]
    )

    assert result.exit_code == 1
    assert "missing.gguf" in result.output
    assert given == ["a:1,b:2"]


def test_the_runtime_is_built_with_rpc_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def build_wheel(observer: object, arguments: list[str], rebuild: bool) -> build.Wheel:
        asked.append(arguments)
        return build.Wheel(Path("x.whl"), tuple(arguments), "", cached=False)

    monkeypatch.setattr(build, "build_wheel", build_wheel)
    CliRunner().invoke(main, ["runtime", "build", "--rpc", "--no-install", "--cmake-args", "-DA=B"])

    assert asked == [["-DA=B", "-DGGML_RPC=ON"]]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    if not HAS_RPC:
        pytest.skip("this llama.cpp has no RPC; run: alignez-gguf runtime build --rpc")
    if not SERVER.is_file():
        pytest.skip(f"no {SERVER}; run: python3 tools/build_llama_tools.py")
    with ExitStack() as opened:
        yield [opened.enter_context(rpc_server()) for _ in range(2)]


@pytest.fixture(scope="module")
def children() -> Iterator[list[ProcessPoolExecutor]]:
    """Two processes: where servers are used once, they are used for every model from then on."""
    with ExitStack() as opened:
        yield [
            opened.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for _ in range(2)
        ]


@pytest.mark.parametrize("file_type", ["F32", "Q8_0", "Q4_K_M"])
def test_steering_over_two_servers_is_as_near_to_one_process_as_the_unsteered_model_is(
    file_type: str, servers: list[str], children: list[ProcessPoolExecutor]
) -> None:
    path = tiny_model("llama", n_embd=N_EMBD, n_layer=N_LAYER).gguf
    if file_type != "F32":
        path = quantized(path, file_type)

    alone, _ = children[0].submit(unsteered_and_steered, path, []).result()
    spread, log = children[1].submit(unsteered_and_steered, path, servers).result()

    for endpoint in servers:
        assert any(endpoint in line and "model buffer size" in line for line in log)
    assert np.abs(alone[1] - alone[0]).max() > 0.1
    unsteered, steered = (float(np.abs(a - b).max()) for a, b in zip(alone, spread, strict=True))
    assert steered <= max(2 * unsteered, FLOOR)


def unsteered_and_steered(path: Path, endpoints: list[str]) -> tuple[list[NDArray[np.float32]], list[str]]:
    """The logits of both, and what llama.cpp says when it loads the model."""
    random = np.random.default_rng(1).standard_normal
    edits = {
        layer: LayerEdit(remove=random((2, N_EMBD)), add=0.3 * random(N_EMBD)) for layer in range(N_LAYER)
    }
    if endpoints:
        rpc.use_servers(endpoints)
    with log_lines() as log:
        parameters = llama_cpp.llama_model_default_params()
        llama_cpp.llama_model_free(llama_cpp.llama_model_load_from_file(str(path).encode(), parameters))
    with Context(path) as context:
        base = context.logits(rows(TOKENS))
        context.set_edits(edits)
        return [base, context.logits(rows(TOKENS))], log


@contextmanager
def rpc_server() -> Iterator[str]:
    """The endpoint of a ggml-rpc-server on this machine."""
    port = free_port()
    command = [SERVER, "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until_it_listens(port, server)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def wait_until_it_listens(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while server.poll() is None and time.monotonic() < deadline:
        if is_listening(port):
            return
        time.sleep(0.05)
    pytest.fail(f"ggml-rpc-server does not start (status {server.poll()})")


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
