"""Hostile files through everything in Python that reads what users bring: control files, models, texts.

Each ends in an error of ours, in one line, or in what it says; never in another exception or a warning, never
later than `SLOWEST_S`, never with more memory than `MEMORY_FACTOR` times the file and `MEMORY_BYTES`.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import gguf
import numpy as np
from numpy.typing import NDArray

from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.gguf_header import MAX_ARRAY
from alignez_gguf.control.model_info import ModelInfo
from alignez_gguf.errors import AlignezError
from fuzz import Outcome, Scale, hostile_text
from fuzz.corpus import Seed, corpus, encode, parse
from fuzz.mutation import mutated

SLOWEST_S = 1.0
MEMORY_FACTOR = 4
MEMORY_BYTES = 1 << 20
"""Beside the multiple of the file, for the small files that are tried here."""

_MEASURED = 64
"""Of so many inputs, one has its memory measured: that takes several times as long."""
_HANG_S = 10.0
"""After which an input is given up."""
_SHARE = 20
"""One model header and one text for so many control files."""
_SHOWN = 20
"""Findings that are kept, at most."""

Read = Callable[[Path], None]
"""Reads a file, and raises `AlignezError`, or `WrongError` where it was read wrongly."""


class WrongError(Exception):
    """A file was accepted, but what came of it cannot be right."""


def stress(scale: Scale, folder: Path) -> Sequence[Outcome]:
    """All readers, with `scale.inputs` control files and a share of other inputs."""
    others = max(1, scale.inputs // _SHARE)
    controls = _with_and_without_hash(corpus())
    with _in_memory() as scratch:
        models = (_model(scratch / "model.gguf"),)
        return (
            _tried(
                "mutated control files, Python reader",
                ((".gguf", mutated(controls, scale.seed, number)) for number in range(scale.inputs)),
                lambda path: check_control(path, scratch / "saved.gguf"),
                scratch,
                folder / "control",
            ),
            _tried(
                "mutated models, Python reader",
                ((".gguf", mutated(models, scale.seed, number)) for number in range(others)),
                check_model,
                scratch,
                folder / "model",
            ),
            _tried(
                "mutated pairs, queries and templates",
                (hostile_text.text(scale.seed, number) for number in range(others)),
                hostile_text.read,
                scratch,
                folder / "text",
            ),
        )


def check_control(path: Path, again: Path) -> None:
    """A control that loads is finite, has the shapes that it says, and comes back from `again` as it was."""
    control = ControlFile.load(path)
    for layer, edit in control.edits.items():
        for array, shape in ((edit.add, (control.model.n_embd,)), (edit.remove, (edit.rank, edit.n_embd))):
            if array is not None and not (array.shape == shape and np.isfinite(array).all()):
                raise WrongError(f"layer {layer} has {array.shape}, or what is not finite")
    if not control.model.n_layer:
        control = replace(control, model=replace(control.model, n_layer=max(control.edits) + 1))
    if control.model.n_layer > MAX_ARRAY:
        return
    control.save(again)
    other = ControlFile.load(again)
    same = (other.model, other.recipe, other.score) == (control.model, control.recipe, control.score)
    if not same or other.edits.keys() != control.edits.keys():
        raise WrongError("it was saved, and came back with other fields")
    for layer, edit in control.edits.items():
        stored = other.edits[layer]
        if not (_equal(edit.add, stored.add) and _equal(edit.remove, stored.remove)):
            raise WrongError(f"it was saved, and layer {layer} came back otherwise")


def _equal(one: NDArray[np.float32] | None, other: NDArray[np.float32] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def check_model(path: Path) -> None:
    """A model that is described has layers, a width and a fingerprint."""
    info = ModelInfo.from_gguf(path)
    if info.n_layer < 1 or info.n_embd < 1 or len(info.fingerprint) != 64 or "\n" in str(info):
        raise WrongError(f"it is described as {info!r}")


@contextmanager
def _in_memory() -> Iterator[Path]:
    """A folder that waits for no disk, where the system has one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as scratch:
        yield Path(scratch)


def _tried(name: str, files: Iterator[tuple[str, bytes]], read: Read, scratch: Path, folder: Path) -> Outcome:
    """Read each file of bytes, given with the ending of its name. What goes wrong is kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    findings: list[str] = []
    slowest, most, count = 0.0, 0, 0
    with warnings.catch_warnings(), _interruptible() as limit:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*damaged rows", UserWarning)
        for number, (ending, data) in enumerate(files):
            count += 1
            path = scratch / f"input{ending}"
            _write(path, data)
            limit(_HANG_S)
            wrong, seconds, peak = _attempt(read, path, measured=number % _MEASURED == 0)
            limit(0)
            slowest, most = max(slowest, seconds), max(most, peak - MEMORY_FACTOR * len(data))
            if seconds > SLOWEST_S:
                wrong = wrong or f"{seconds:.1f} s"
            if peak > MEMORY_FACTOR * len(data) + MEMORY_BYTES:
                wrong = wrong or f"{peak} bytes of memory for {len(data)}"
            if wrong and len(findings) < _SHOWN:
                kept = folder / f"{number}{ending}"
                kept.write_bytes(data)
                findings.append(f"{kept}: {wrong}")
    detail = f"slowest {slowest:.3f} s, at most {most / 1024:.0f} KiB beyond {MEMORY_FACTOR}x the file"
    return Outcome(name, count, tuple(findings), detail)


def _attempt(read: Read, path: Path, *, measured: bool) -> tuple[str, float, int]:
    """What went wrong, if anything, the seconds, and the peak of memory where it is measured."""
    wrong = ""
    if measured:
        tracemalloc.start()
    started = time.perf_counter()
    try:
        read(path)
    except AlignezError as error:
        if "\n" in str(error):
            wrong = f"an error of several lines: {str(error)!r}"
    except Exception as error:
        wrong = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    seconds = time.perf_counter() - started
    if not measured:
        return wrong, seconds, 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return wrong, 0.0, peak  # what is measured is slow


def _write(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(file, data)
    os.close(file)


@contextmanager
def _interruptible() -> Iterator[Callable[[float], object]]:
    """Gives what sets a limit in seconds, 0 for none: `TimeoutError` follows. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: None
        return

    def give_up(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"no end after {_HANG_S:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _with_and_without_hash(seeds: Sequence[Seed]) -> tuple[Seed, ...]:
    """Without its hash, a file that says something else may still be a right one."""
    bare = [
        parse(encode([field for field in seed.metadata if b"alignez.sha256" not in field], seed.tensors))
        for seed in seeds
    ]
    return (*seeds, *bare)


def _model(path: Path) -> Seed:
    """A model as small as can be."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_file_type(0)
    writer.add_token_list(["a", "b", "c"])
    writer.add_string("llama.nextn_predict_layers", "0")
    for name in ("token_embd.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight"):
        writer.add_tensor(name, np.ones((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parse(path.read_bytes())
