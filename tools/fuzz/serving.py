"""Good and bad clients of one `alignez-gguf serve`, with slow ones beside them all the time.

Every good request gets the answer that it gets alone, every bad one its refusal, and the process ends with no
more memory than after the first of them, nothing waiting, and none of its keys in its log.
"""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from fuzz import Outcome, Scale
from fuzz.bad_clients import KEY, MAX_BODY, PROMPTS, WRONG_KEY, Client, Good, head, send

_PROGRAM = [sys.executable, "-c", "from alignez_gguf.cli import main; main(prog_name='alignez-gguf')"]
_AT_ONCE = 12
_N_SLOW = 40
_SLOW_ENDS_S = 45.0
"""The server ends a request that takes longer than 30 s to arrive."""
_WARM_UP = 0.2
"""Part of the requests after which memory is measured first."""
_MOST_GROWTH = 48 << 20
_ENOUGH = 25
"""Different findings after which there is no point in going on."""
_REQUESTS_PER_EXAMPLE = 200


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def memory(self) -> int:
        """Resident bytes; 0 where the system does not say."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return 0
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) << 10 if found else 0


def stress(scale: Scale, folder: Path) -> Sequence[Outcome]:
    """`scale.requests` to one server, and what schemathesis makes of its description."""
    with serving(folder) as server:
        return clients(server, scale), described(server, scale, folder)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    control, log = folder / "safe.gguf", folder / "server.log"
    info = ModelInfo.from_gguf(demo.MODEL)
    remove, add = np.random.default_rng(0).standard_normal((2, info.n_embd), np.float32)
    edits = {1: LayerEdit(remove=remove), 2: LayerEdit(add=10 * add)}
    ControlFile(info, edits).save(control)
    command = [*_PROGRAM, "serve", str(demo.MODEL), "-c", str(control), "--port", "0", "--threads", "1"]
    command += ["--api-key", KEY, "--context", "256", "--max-tokens", "16", "--max-body", str(MAX_BODY)]
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            yield Server(process, _port(process, log), log)
        finally:
            process.terminate()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    while process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8")):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"the server does not start: {log.read_text(encoding='utf-8')}")


def clients(server: Server, scale: Scale) -> Outcome:
    alone = Client(server.port, {})
    goods = itertools.product(PROMPTS, range(3), (0.0, 0.5, 1.0, 1.7), (True, False), (True, False))
    expected = {good: alone.answer(good) for good in itertools.starmap(Good, goods)}
    client = Client(server.port, expected)
    n_warm = int(_WARM_UP * scale.requests)
    with _slow_clients(client) as slow, ThreadPoolExecutor(_AT_ONCE) as senders:
        findings = _sent(senders, client, scale.seed, range(n_warm))
        warm = server.memory
        findings += _sent(senders, client, scale.seed, range(n_warm, scale.requests))
        findings += slow.findings()
    findings += after(server, alone)
    growth = server.memory - warm
    if growth > _MOST_GROWTH:
        findings.append(f"{growth >> 20} MiB more memory than after the first {n_warm} requests")
    detail = f"half of them good; memory {warm >> 20} MiB, {growth / (1 << 20):+.1f} MiB at the end"
    return Outcome("requests, good and bad, and slow ones", scale.requests, tuple(findings), detail)


def _sent(senders: ThreadPoolExecutor, client: Client, seed: int, numbers: range) -> list[str]:
    findings: list[str] = []
    for wrong in senders.map(lambda number: send(client, seed, number), numbers):
        if wrong and len(findings) < _ENOUGH:
            findings.append(wrong)
    return findings


class _SlowClients:
    """Connections over which a byte comes now and then: of a head, or of a body."""

    def __init__(self, client: Client) -> None:
        self._began = time.monotonic()
        whole = head(9999)
        self._open = {client.connect(whole if number % 2 else whole[:9]) for number in range(_N_SLOW)}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._dribble)
        self._thread.start()

    def _dribble(self) -> None:
        while not self._stopped.wait(0.5):
            for connection in list(self._open):
                self._send_one_byte(connection)

    def _send_one_byte(self, connection: socket.socket) -> None:
        try:
            connection.send(b"x")
        except OSError:
            self._open.discard(connection)
            connection.close()

    def findings(self) -> list[str]:
        """What there is to say once they should have been ended."""
        late = time.monotonic() - self._began > _SLOW_ENDS_S
        return [f"{len(self._open)} slow requests were not ended"] if late and self._open else []

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for connection in self._open:
            connection.close()


@contextmanager
def _slow_clients(client: Client) -> Iterator[_SlowClients]:
    slow = _SlowClients(client)
    try:
        yield slow
    finally:
        slow.close()


def after(server: Server, client: Client) -> list[str]:
    """What is wrong with a server that everybody has left."""
    findings = []
    if server.process.poll() is not None:
        return [f"the server ended with {server.process.returncode}"]
    deadline = time.monotonic() + 30
    while left := re.findall(
        r"^alignez_\w+_requests (?!0\.0).*", client.http.get("/metrics").text, re.MULTILINE
    ):
        if time.monotonic() > deadline:
            findings.append(f"everybody has left, and {' and '.join(left)}")
            break
        time.sleep(0.1)
    default = client.http.get("/v1/steering").json()
    if (default["control"], default["strength"]) != ("safe", 1.0):
        findings.append("a default that was refused is in force")
    log = server.log.read_text(encoding="utf-8", errors="replace")
    shown = log + client.http.get("/metrics").text
    findings += [f"a key is in the log or in the metrics: {key}" for key in (KEY, WRONG_KEY) if key in shown]
    findings += [f"the log has {word!r}: {server.log}" for word in ("Traceback", "Exception") if word in log]
    return findings


def described(server: Server, scale: Scale, folder: Path) -> Outcome:
    """Requests that schemathesis makes from the OpenAPI description."""
    name = "requests from the OpenAPI description"
    if find_spec("schemathesis") is None:
        return Outcome(name, 0, detail="schemathesis is not installed")
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        url,
        "--header",
        f"Authorization: Bearer {KEY}",
    ]
    # Whether messages are a conversation and fit into the context cannot be said in a schema.
    command += ["--exclude-checks", "positive_data_acceptance", "--generation-database", "none", "--no-color"]
    command += ["--max-examples", str(max(1, scale.requests // _REQUESTS_PER_EXAMPLE))]
    done = subprocess.run([*command, "--seed", str(scale.seed)], cwd=folder, capture_output=True, text=True)
    report = folder / "schemathesis.txt"
    report.write_text(done.stdout + done.stderr, encoding="utf-8")
    found = re.search(r"(\d+) generated", done.stdout)
    findings = (
        () if done.returncode == 0 and found else (f"schemathesis ends with {done.returncode}: {report}",)
    )
    return Outcome(name, int(found[1]) if found else 0, findings, "by schemathesis")
