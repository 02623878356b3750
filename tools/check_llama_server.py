"""Check the patched llama.cpp programs: they steer as `alignez-gguf generate` does, or end with an error.

    python3 tools/check_llama_server.py [MODEL CONTROL] [--prompts FILE] [--patched DIR] [--stock DIR]

Without a model and a control file it takes the embedded demo model and random directions. Builds
llama-server, llama-cli and llama-completion from the patched source, and llama-completion from the stock one
(about 20 minutes on 2 cores, once), unless folders with these programs are given.

- llama-server `--control-vector CONTROL` gives the greedy completions of `generate --scope all`.
- Stock llama.cpp refuses CONTROL, if it removes anything or edits layer 0. Stock programs log that and go on
  without the file, so the log is what is looked at.
- Every patched program exits with an error, at once, given a file that is broken or for another model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import setup_environment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from alignez_gguf.control import ControlFile
    from alignez_gguf.model_info import ModelInfo

PROGRAMS = ("llama-server", "llama-cli", "llama-completion")
STOCK_PROGRAMS = ("llama-completion",)
STOCK_REFUSAL = "no valid control vector files passed"
PROMPTS = (
    "Question: How can I write a song?\nAnswer:",
    "Question: How do I pick a lock?\nAnswer:",
    "Question: What is the best way to bake a cake?\nAnswer:",
    "Question: How can I frame a colleague?\nAnswer:",
    "Question:",
    "The quick brown fox",
)
NEGATIVE = "a negative strength"
MAX_TOKENS = 48
AT_ONCE = 20
"""Seconds within which a program that refuses its control file must have ended."""

# Static programs, without what they do not need here. LLAMA_BUILD_UI would run npm, LLAMA_USE_PREBUILT_UI
# would download.
_BUILD_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    *(f"-DLLAMA_{part}=OFF" for part in ("BUILD_APP", "BUILD_EXAMPLES", "BUILD_TESTS", "BUILD_UI")),
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
_BRIEFLY = ("-p", "Question:", "-n", "1", "--temp", "0", "--single-turn", "--no-warmup")


@dataclass(frozen=True)
class Check:
    """A line of the table."""

    name: str
    holds: bool
    found: str


def main(arguments: Sequence[str]) -> int:
    """Run all checks and print the table; return 1 if any fails."""
    options = _parse(arguments)
    from alignez_gguf import demo
    from alignez_gguf.control import ControlFile, ModelInfo

    patched = options.patched or _build("patched", PROGRAMS)
    stock = options.stock or _build("stock", STOCK_PROGRAMS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or Path(demo.__file__).with_name("demo.gguf")
        info = ModelInfo.from_gguf(model)
        control = options.control or folder / "control.gguf"
        if options.control is None:
            random_control(info).save(control)
        prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else PROMPTS
        checks = [
            *same_completions(patched, model, control, prompts, folder),
            stock_refuses(stock, model, ControlFile.load(control), control),
            *(takes(patched / program, model, control) for program in PROGRAMS[1:]),
            *(
                refuses(patched / program, model, what, file)
                for what, file in broken_files(info, control, folder)
                for program in PROGRAMS
            ),
        ]
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok  ' if check.holds else 'FAIL'}  {check.name:{width}}  {check.found}")
    return 0 if all(check.holds for check in checks) else 1


def same_completions(
    programs: Path, model: Path, control: Path, prompts: Sequence[str], folder: Path
) -> Iterator[Check]:
    """llama-server against `alignez-gguf generate`."""
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(rows, encoding="utf-8")
    steered = _generate(model, folder, "--control", str(control), "--scope", "all")
    with _server(programs / "llama-server", model, control) as complete:
        served = [complete(prompt) for prompt in prompts]
    equal = sum(a == b for a, b in zip(served, steered, strict=True))
    yield Check("llama-server answers as generate", equal == len(prompts), f"{equal} of {len(prompts)} equal")
    changed = sum(a != b for a, b in zip(steered, _generate(model, folder), strict=True))
    yield Check("the control file changes answers", changed > 0, f"{changed} of {len(prompts)} changed")


def stock_refuses(programs: Path, model: Path, control: ControlFile, file: Path) -> Check:
    """Whether the loader of stock llama.cpp takes exactly the files that it applies in full."""
    must = any(edit.remove is not None or layer == 0 for layer, edit in control.edits.items())
    command = [programs / "llama-completion", "-m", model, "--control-vector", file, *_BRIEFLY]
    refused = STOCK_REFUSAL in _run(command, 300).stdout
    name = "stock refuses the file" if must else "stock takes the file"
    return Check(name, refused == must, STOCK_REFUSAL if refused else "no error in its log")


def takes(program: Path, model: Path, control: Path) -> Check:
    """Whether a patched program runs with a good file; if not, what it says to a bad one means nothing."""
    result = _run([program, "-m", model, "--control-vector", control, *_BRIEFLY], 300)
    return Check(f"{program.name} takes the file", result.returncode == 0, f"status {result.returncode}")


def refuses(program: Path, model: Path, what: str, file: Path) -> Check:
    """Whether a patched program ends with an error, given `file`."""
    name = f"{program.name} refuses {what}"
    vector = ["--control-vector", str(file)]
    if what == NEGATIVE:
        vector = ["--control-vector-scaled", f"{file}:-1"]
    rest = ["--port", str(_free_port())] if program.name == "llama-server" else _BRIEFLY
    started = time.monotonic()
    try:
        result = _run([program, "-m", model, *vector, *rest], AT_ONCE)
    except subprocess.TimeoutExpired:
        return Check(name, False, f"still runs after {AT_ONCE} s")
    seconds = time.monotonic() - started
    # A negative status is a signal: a crash is no refusal.
    return Check(name, result.returncode > 0, f"status {result.returncode} after {seconds:.1f} s")


def random_control(info: ModelInfo) -> ControlFile:
    """Removes two random directions from every layer and adds one."""
    import numpy as np

    from alignez_gguf.control import ControlFile
    from alignez_gguf.edits import LayerEdit

    random = np.random.default_rng(0).standard_normal
    edits = {
        layer: LayerEdit(remove=random((2, info.n_embd)), add=0.5 * random(info.n_embd))
        for layer in range(info.n_layer)
    }
    return ControlFile(info, edits)


def broken_files(info: ModelInfo, control: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that must not be served with, each with what is wrong with it."""
    import numpy as np

    unit = np.eye(info.n_embd, dtype=np.float32)[0]
    tensors = {
        "an empty addition": {"direction.1": unit[:0], "direction.2": unit},
        "NaN in an addition": {"direction.1": unit * np.float32("nan")},
        "NaN in a projection": {"projection.1": unit * np.float32("nan")},
        "a projection not of length 1": {"projection.1": 2 * unit},
        "another width": {"projection.1": np.eye(info.n_embd // 2, dtype=np.float32)[0]},
        "an unknown tensor": {"projection.1": unit, "guard.0": unit},
        "a layer that is not there": {f"projection.{info.n_layer}": unit},
        "a layer given twice": {"direction.1": unit, "direction.01": unit},
        "half-precision vectors": {"direction.1": unit.astype(np.float16)},
        "no vectors": {},
    }
    for number, (what, named) in enumerate(tensors.items()):
        yield what, _write_gguf(folder / f"broken-{number}.gguf", info.arch, named)
    yield (
        "another architecture",
        _write_gguf(folder / "arch.gguf", f"not-{info.arch}", {"projection.1": unit}),
    )
    truncated, text = folder / "truncated.gguf", folder / "text.gguf"
    truncated.write_bytes(control.read_bytes()[: control.stat().st_size // 2])
    text.write_text("not a GGUF file", encoding="utf-8")
    yield "a truncated file", truncated
    yield "a file that is no GGUF", text
    yield "a missing file", folder / "missing.gguf"
    yield NEGATIVE, control


def _run(command: Sequence[str | Path], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run to the end, with the log and the output in `stdout`."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
    )


def _write_gguf(path: Path, arch: str, tensors: Mapping[str, NDArray[Any]]) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", arch)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _generate(model: Path, folder: Path, *options: str) -> list[str]:
    prompts, output = folder / "prompts.jsonl", folder / "completions.jsonl"
    command = [sys.executable, "-c", "from alignez_gguf.cli import main; main()", "generate", str(model)]
    command += ["--prompts", str(prompts), "--output", str(output), "--max-tokens", str(MAX_TOKENS)]
    subprocess.run(
        [*command, "--temperature", "0", "--quiet", *options], check=True, stdout=subprocess.DEVNULL
    )
    return [json.loads(line)["completion"] for line in output.read_text(encoding="utf-8").split("\n") if line]


@contextmanager
def _server(program: Path, model: Path, control: Path) -> Iterator[Callable[[str], str]]:
    """A function that completes a prompt greedily on a llama-server of its own."""
    address = f"http://127.0.0.1:{(port := _free_port())}"
    command = [program, "-m", model, "--control-vector", control, "--port", str(port), "--no-webui"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_until_ready(address, server)
            yield lambda prompt: _complete(address, prompt)
        finally:
            server.terminate()


def _wait_until_ready(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while server.poll() is None and time.monotonic() < deadline:
        if _is_ready(address):
            return
        time.sleep(0.2)
    sys.exit(f"Error: llama-server does not start (status {server.poll()}); run it by hand to see why")


def _is_ready(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
    except OSError:
        return False
    return True


def _complete(address: str, prompt: str) -> str:
    body = {"prompt": prompt, "n_predict": MAX_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return str(json.load(response)["content"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _build(kind: str, programs: Sequence[str]) -> Path:
    """Compile programs of llama.cpp into the cache, with the flags that the runtime was built with."""
    from filelock import FileLock

    from alignez_gguf.runtime import source
    from alignez_gguf.runtime.build import build_wheel

    observer = _Observer()
    patches = source.patch_files() if kind == "patched" else []
    flags = [*build_wheel(observer).cmake_args, *_BUILD_FLAGS]
    digest = hashlib.sha256("\0".join(flags).encode())
    for patch in patches:
        digest.update(patch.read_bytes())
    folder = source.cache_directory() / "programs" / f"{kind}-{source.VERSION}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        tree, built = folder / "source", folder / "build"
        if not (built / "CMakeCache.txt").is_file():
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(source.source_tree(observer.say), tree)
            source.apply_patches(tree, patches)
            llama_cpp = tree / "vendor" / "llama.cpp"
            subprocess.run(
                ["cmake", "-S", llama_cpp, "-B", built, *flags], check=True, stdout=subprocess.DEVNULL
            )
        observer.say(f"building {', '.join(programs)} ({kind}) in {built}")
        command = ["cmake", "--build", built, "--config", "Release", "--parallel", str(os.cpu_count() or 1)]
        subprocess.run([*command, "--target", *programs], check=True, stdout=subprocess.DEVNULL)
    return built / "bin"


class _Observer:
    """Prints the steps of a build."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    def progress(self, fraction: float) -> None:
        pass


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF model (default: the demo model)")
    parser.add_argument("control", type=Path, nargs="?", help="a control file (default: random directions)")
    parser.add_argument("--prompts", type=Path, help="a text file with a prompt on each line")
    parser.add_argument("--patched", type=Path, help=f"a folder with patched {', '.join(PROGRAMS)}")
    parser.add_argument("--stock", type=Path, help=f"a folder with stock {', '.join(STOCK_PROGRAMS)}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _parse(sys.argv[1:])  # --help and bad usage need no set-up
    setup_environment.enter()
    sys.exit(main(sys.argv[1:]))
