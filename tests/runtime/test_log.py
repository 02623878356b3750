"""What llama.cpp logs is caught by the thread that asked for it, and its callback outlives every capture."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import llama_cpp
import pytest

from alignez_gguf.runtime.bindings import captured_log
from tests.models import tiny_model


def fail_to_load(name: str) -> None:
    llama_cpp.llama_model_load_from_file(f"{name}.gguf".encode(), llama_cpp.llama_model_default_params())


def test_captures_that_end_out_of_order_leave_a_callback_that_lives() -> None:
    first, second = captured_log(), captured_log()
    first.__enter__()
    log = second.__enter__()
    first.__exit__(None, None, None)
    fail_to_load("inner")
    second.__exit__(None, None, None)
    fail_to_load("nobody-listens")

    assert "inner.gguf" in " ".join(log.errors)
    assert "nobody-listens" not in " ".join(log.errors)


def test_threads_catch_their_own_errors() -> None:
    logs, at_once = {}, threading.Barrier(3)

    def load(name: str) -> None:
        with captured_log() as log:
            at_once.wait()
            fail_to_load(name)
            at_once.wait()
        logs[name] = " ".join(log.errors)

    threads = [threading.Thread(target=load, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for name, text in logs.items():
        assert [other for other in logs if f"{other}.gguf" in text] == [name]


def test_what_nobody_captures_goes_to_the_callback_of_the_program() -> None:
    heard: list[bytes] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: heard.append(text))
    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        with captured_log() as log:
            fail_to_load("caught")
        fail_to_load("heard")
    finally:
        llama_cpp.llama_log_set(former, data)

    assert "caught.gguf" in " ".join(log.errors)
    assert b"heard.gguf" in b"".join(heard)
    assert b"caught.gguf" not in b"".join(heard)


def test_threads_that_open_engines_at_once_do_not_crash(tmp_path: Path) -> None:
    program = """
        import sys, threading
        from alignez_gguf.engines.base import GenerationRequest, Sampling
        from alignez_gguf.engines.llama.engine import LlamaEngine

        answers = set()

        def work():
            for _ in range(10):
                with LlamaEngine(sys.argv[1], n_ctx=64, n_threads=1) as engine:
                    request = GenerationRequest("a b c")
                    found = dict(engine.generate([request], Sampling(max_tokens=4, temperature=0.0)))
                    answers.add(found[0].text)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(answers))
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tiny_model("llama").gguf)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["1"]


def test_a_callback_of_the_program_may_be_freed_when_it_has_been_replaced() -> None:
    former, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    with captured_log():
        pass
    current = llama_cpp.llama_log_callback()
    llama_cpp.llama_log_get(ctypes.byref(current), ctypes.byref(data))
    llama_cpp.llama_log_set(former, data)

    assert ctypes.cast(current, ctypes.c_void_p).value == ctypes.cast(callback, ctypes.c_void_p).value


@pytest.mark.parametrize("level", [4, 5])
def test_a_line_in_pieces_is_one_error(level: int) -> None:
    with captured_log() as log:
        log.receive(4, b"it is ")
        log.receive(5, b"broken\n")
        log.receive(2, b"for your information\n")
        log.receive(level, b"another\n")

    assert log.reason() == "it is broken"
    assert ["another\n"] * (level == 4) == log.errors[1:]
