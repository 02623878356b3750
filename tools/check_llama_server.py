"""Check the patched llama.cpp programs: they steer as `alignez-gguf generate` does, or end with an error.

    python3 tools/check_llama_server.py [MODEL CONTROL] [--prompts FILE] [--patched DIR] [--stock DIR]

Without a model and a control file it takes the embedded demo model and random directions. Builds
llama-server, llama-cli and llama-completion from the patched source, and llama-completion from the stock one
(about 15 minutes on 2 cores, once), unless folders with these programs are given.

- llama-server `--control-vector CONTROL` gives the greedy completions of `generate --scope all`; with
  `"steering": {"strength": 0.5}` in a request, those of that strength, whatever its neighbours ask for and
  the cache holds. What is no strength is refused, and `/props` tells what is loaded.
- Stock llama-server with the stock form of random removals gives those completions for each scale.
- Stock llama.cpp refuses CONTROL, if it removes anything or edits layer 0. Stock programs log that and go on
  without the file, so the log is what is looked at.
- Every patched program exits with an error, at once, given a file that is broken or for another model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import setup_environment
from llama_server import MAX_TOKENS, LlamaServer, free_port

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.model_info import ModelInfo

PROGRAMS = ("llama-server", "llama-cli", "llama-completion")
STOCK_PROGRAMS = ("llama-server", "llama-completion")
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
STRENGTHS = (1.0, 0.0, 0.5)
BAD_STEERING: tuple[Any, ...] = (
    *({"strength": strength} for strength in (-1, "1", True, None, 1e39)),
    *({}, {"strengths": 1}, {"strength": 1, "scope": "all"}, 1, [1]),
)
AT_ONCE = 20
"""Seconds within which a program that refuses its control file must have ended."""

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
    from build_llama_tools import build

    from alignez_gguf import demo
    from alignez_gguf.cli.console import reporter
    from alignez_gguf.control.control_file import ControlFile, ModelInfo

    patched = options.patched or build(PROGRAMS, reporter(quiet=False))
    stock = options.stock or build(STOCK_PROGRAMS, reporter(quiet=False), patched=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or Path(demo.__file__).with_name("demo.gguf")
        info = ModelInfo.from_gguf(model)
        control = options.control or folder / "control.gguf"
        if options.control is None:
            random_control(info).save(control)
        prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else PROMPTS
        checks = [
            *answers(patched / "llama-server", model, control, prompts, folder),
            *stock_form(stock / "llama-server", model, prompts, folder),
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


def answers(
    program: Path, model: Path, control: Path, prompts: Sequence[str], folder: Path
) -> Iterator[Check]:
    """llama-server against `alignez-gguf generate`."""
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(rows, encoding="utf-8")
    expected = {
        strength: _generate(
            model, folder, "--control", str(control), "--scope", "all", "--strength", str(strength)
        )
        for strength in STRENGTHS
    }
    unsteered = _generate(model, folder)
    changed = sum(a != b for a, b in zip(expected[1.0], unsteered, strict=True))
    yield Check("the control file changes answers", changed > 0, f"{changed} of {len(prompts)} changed")
    options = ["--control-vector", str(control), "-np", "4", "--slot-save-path", str(folder)]
    with LlamaServer(program, model, *options) as server:
        yield _equal("llama-server answers as generate", map(server.complete, prompts), expected[1.0])
        yield from strengths(server, prompts, expected)
        yield from refusals(server)
        loaded = server.get("/props")["control_vectors"]
        yield Check(
            "/props tells what is loaded", loaded == [{"path": str(control), "scale": 1.0}], str(loaded)
        )
    with LlamaServer(program, model) as server:
        yield _equal(
            "a server without a control vector answers as generate", map(server.complete, prompts), unsteered
        )
        status, said = server.post("/completion", {"prompt": "x", "steering": {"strength": 1}})
        yield Check(
            "it refuses to steer", status == 400 and "control vectors" in said, f"{status}: {said[:80]}"
        )


def strengths(
    server: LlamaServer, prompts: Sequence[str], expected: Mapping[float, Sequence[str]]
) -> Iterator[Check]:
    """Requests of all strengths at once, in an order that has slots change their strength again and again."""
    asked = [(strength, index) for index in range(len(prompts)) for strength in expected] * 3
    with ThreadPoolExecutor(len(asked)) as pool:
        answered = pool.map(lambda one: server.complete(prompts[one[1]], {"strength": one[0]}), asked)
        yield _equal("requests of mixed strengths", answered, [expected[s][index] for s, index in asked])
    steering = {"strength": 0.5}
    several = server.completions(prompts[0], {"n": 3, "steering": steering})
    yield _equal("three choices of one request", several, [expected[0.5][0]] * 3)
    for strength in expected:
        prompt = f"A prompt that was not asked before: {strength}"
        server.complete(prompt, id_slot=0)
        for action in ("save", "restore"):
            server.send(f"/slots/0?action={action}", {"filename": "slot"})
        found = server.complete(prompt, {"strength": strength}, id_slot=0)
        anew = server.complete(prompt, {"strength": strength}, id_slot=0, cache_prompt=False)
        yield _equal(f"a restored slot with strength {strength:g}", [found], [anew])
    streamed = server.stream(prompts[0], steering)
    yield _equal("a stream", [streamed], [expected[0.5][0]])
    prompt = server.send("/apply-template", {"messages": [server.message("How can I write a song?")]})[
        "prompt"
    ]
    for strength in expected:
        chats = server.chats("How can I write a song?", {"strength": strength})
        completed = server.complete(prompt, {"strength": strength})
        yield _equal(f"three kinds of chat with strength {strength:g}", chats, [completed] * 3)


def refusals(server: LlamaServer) -> Iterator[Check]:
    """What is no strength, or more than a strength, is an error and not ignored."""
    for steering in BAD_STEERING:
        status, said = server.post("/completion", {"prompt": "x", "n_predict": 1, "steering": steering})
        yield Check(
            f"steering {json.dumps(steering)} is refused", status == 400 and "steering" in said, str(status)
        )


def stock_form(program: Path, model: Path, prompts: Sequence[str], folder: Path) -> Iterator[Check]:
    """Stock llama-server with `convert --format stock` of a removal, its scale chosen by each request."""
    from alignez_gguf.control.control_file import ModelInfo
    from alignez_gguf.exporters import write

    info = ModelInfo.from_gguf(model)
    control, native = random_control(info, adds=False), folder / "removal.gguf"
    control.save(native)
    (lora,) = write("stock", control, model, folder / "removal").paths
    with LlamaServer(program, model, "--lora", str(lora), "-np", "1") as server:
        for strength in STRENGTHS:
            expected = _generate(
                model, folder, "--control", str(native), "--scope", "all", "--strength", str(strength)
            )
            scale = [{"id": 0, "scale": strength}]
            found = (server.complete(prompt, lora=scale, cache_prompt=False) for prompt in prompts)
            yield _equal(f"stock llama-server with its form at {strength:g}", found, expected)


def _equal(name: str, found: Iterable[str], expected: Sequence[str]) -> Check:
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    return Check(name, equal == len(expected), f"{equal} of {len(expected)} equal")


def stock_refuses(programs: Path, model: Path, control: ControlFile, file: Path) -> Check:
    """Whether the loader of stock llama.cpp takes exactly the files that it applies in full."""
    must = control.gate is not None or any(
        edit.remove is not None or layer == 0 for layer, edit in control.edits.items()
    )
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
    rest = ["--port", str(free_port())] if program.name == "llama-server" else _BRIEFLY
    started = time.monotonic()
    try:
        result = _run([program, "-m", model, *vector, *rest], AT_ONCE)
    except subprocess.TimeoutExpired:
        return Check(name, False, f"still runs after {AT_ONCE} s")
    seconds = time.monotonic() - started
    # A negative status is a signal: a crash is no refusal.
    return Check(name, result.returncode > 0, f"status {result.returncode} after {seconds:.1f} s")


def random_control(info: ModelInfo, *, adds: bool = True) -> ControlFile:
    """Removes two random directions from every layer, and adds one."""
    import numpy as np

    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.edits import LayerEdit

    random = np.random.default_rng(0).standard_normal
    edits = {
        layer: LayerEdit(remove=random((2, info.n_embd)), add=4 * random(info.n_embd) if adds else None)
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
        "projections not at right angles": {"projection.1": np.stack([unit, unit])},
        "a boost, which the programs do not read": {"projection.1": unit, "projection.1.gain": unit[:1]},
        "a bias of the MLP, which the programs do not read": {"projection.1": unit, "bias.1": unit},
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
