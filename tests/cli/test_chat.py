from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from alignez_gguf import demo
from alignez_gguf.demo import eval_queries
from alignez_gguf.engines import GenerationRequest, Sampling
from alignez_gguf.engines.llama import LlamaEngine
from alignez_gguf.prompts import Templates
from tests.cli.conftest import PROGRAM, Run
from tests.models import tiny_model

QUERY = eval_queries()[0].query
GREEDY = ("--temperature", "0", "--max-tokens", "16", "--quiet")


@pytest.fixture(scope="module")
def answers() -> Iterator[Callable[..., str]]:
    """What the model says, asked through the engine: after some turns, steered or not."""
    templates = Templates.from_file(demo.TEMPLATES)
    with LlamaEngine(demo.MODEL, n_parallel=1, n_threads=1) as engine:

        def answer(message: str, *turns: tuple[str, str]) -> str:
            prompt = templates.transcript(turns, message)
            ((_, completion),) = engine.generate(
                [GenerationRequest(prompt)], Sampling(16, 0, stop=templates.stop)
            )
            return completion.text

        yield answer


def test_lines_in_answers_out(run: Run, model: str, answers: Callable[..., str]) -> None:
    other = eval_queries()[1].query
    result = run("chat", model, *GREEDY, stdin=f"{QUERY}\n\n  {other}  \n")
    first = answers(QUERY)
    second = answers(other, (QUERY, first.strip()))
    assert first != second
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr == ""
    assert result.exit_code == 0


def test_reset_forgets_the_conversation(run: Run, model: str, answers: Callable[..., str]) -> None:
    result = run("chat", model, *GREEDY, stdin=f"Hello\n/reset\n{QUERY}\n")
    assert result.stdout.splitlines()[1:] == ["forgotten", answers(QUERY)]


def test_quit_ends_the_chat(run: Run, model: str) -> None:
    result = run("chat", model, *GREEDY, stdin=f"/quit\n{QUERY}\n")
    assert (result.exit_code, result.stdout) == (0, "")


def test_strength_on_and_off_steer_the_answers_to_come(run: Run, model: str, control: str) -> None:
    def first_answer(*commands: str) -> str:
        result = run("chat", model, *GREEDY, "-c", control, stdin="\n".join([*commands, QUERY]))
        assert result.exit_code == 0
        *said, answer = result.stdout.splitlines()
        assert len(said) == len(commands)
        return answer

    def plain() -> str:
        return run("chat", model, *GREEDY, stdin=QUERY).stdout.rstrip("\n")

    steered = first_answer()
    assert first_answer("/off") == first_answer("/strength 0") == plain()
    assert steered != plain()
    assert first_answer("/off", "/on") == first_answer("/strength 1") == steered


def test_commands_say_what_they_did(run: Run, model: str, control: str) -> None:
    commands = "/strength 0.7\n/off\n/on\n/help\n/nonsense\n/strength much\n/strength -1\n/strength\n"
    result = run("chat", model, *GREEDY, "-c", control, stdin=commands)
    lines = result.stdout.splitlines()
    assert lines[:3] == ["strength 0.7", "strength 0", "strength 1"]
    assert lines.count("/nonsense is not a command") == 1
    for name in ("/strength", "/on, /off", "/reset", "/help", "/quit"):
        assert sum(line.startswith(name) for line in lines) == 2  # of /help, and of what is no command
    errors = result.stderr.splitlines()
    assert [error.startswith("Error: ") for error in errors] == [True] * 3
    assert "'much' is not a number" in errors[0]
    assert "the strength is -1" in errors[1]
    assert result.exit_code == 0


def test_strength_without_a_control_is_an_error_and_the_chat_goes_on(run: Run, model: str) -> None:
    result = run("chat", model, *GREEDY, stdin=f"/on\n{QUERY}\n")
    assert result.stderr == "Error: no control file was given; start the chat with -c FILE\n"
    assert result.stdout.strip()


def test_bytes_that_are_no_text_do_not_end_the_chat(run: Run, model: str) -> None:
    result = run("chat", model, *GREEDY, stdin=b"na\xefve\n/reset\n")
    assert result.exit_code == 0
    assert "forgotten" in result.stdout


class Terminal:
    """The chat in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # A session takes the first terminal that it opens, and that one sends it Ctrl-C.
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> None:
        """Read on until `text` appears, and forget everything up to it."""
        self._read_until(lambda: text in self.seen, text)
        self.seen = self.seen.partition(text)[2]

    def wait_for_more(self, length: int) -> None:
        """Read on until so many characters have come since the last call."""
        self._read_until(lambda: len(self.seen) >= length, f"{length} characters")

    def _read_until(self, enough: Callable[[], bool], wanted: str) -> None:
        deadline = time.monotonic() + 30
        while not enough():
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {wanted!r} in time after {self.seen[-200:]!r}"
            try:
                self.seen += os.read(self._master, 4096).decode(errors="replace")
            except OSError as error:  # Linux says so where the other side is closed
                raise AssertionError(f"ended without {wanted!r} after {self.seen[-200:]!r}") from error

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    # A random model that repeats itself: its greedy answer goes on for minutes.
    gguf = str(tiny_model("llama").gguf)
    endless = ("--context", "65536", "--max-tokens", "32768", "--temperature", "0")
    terminal = Terminal("chat", gguf, "--threads", "1", *endless)
    yield terminal
    terminal.close()


def test_interrupt_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("/help lists what else you can type")
    terminal.type("The quick brown fox\n")
    terminal.wait_for("The quick brown fox")
    terminal.wait_for_more(300)
    terminal.type("\x03")
    terminal.type("/reset\n")
    terminal.wait_for("forgotten\r\n> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=30) == 0


def test_interrupt_where_nothing_is_answered_ends_the_chat(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    for _ in range(5):
        # Python loses an interrupt that comes after the prompt is shown and before it reads.
        terminal.type("\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(timeout=5)
            break
    assert terminal.process.returncode == 0
