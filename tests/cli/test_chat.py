from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest

import alignez_gguf
from alignez_gguf import demo
from alignez_gguf.demo import eval_queries
from alignez_gguf.engines.base import GenerationRequest, Sampling
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.prompts.templates import Templates
from tests.cli.conftest import PROGRAM, Run, environment
from tests.models import tiny_model

QUERY = eval_queries()[0].query
GREEDY = ("--temperature", "0", "--max-tokens", "16", "--quiet")


@pytest.fixture(scope="module")
def answers() -> Iterator[Callable[..., str]]:
    """What the model says, asked through the engine: after some turns, steered or not."""
    templates = Templates.from_file(demo.TEMPLATES)
    with LlamaEngine(demo.MODEL, n_parallel=1, n_threads=1) as engine:

        def answer(message: str, *turns: tuple[str, str]) -> str:
            prompt = templates.conversation(turns, message)
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
    for name in ("/strength", "/on, /off", "/scope", "/control", "/save", "/reset", "/help", "/quit"):
        assert sum(line.startswith(name) for line in lines) == 2  # of /help, and of what is no command
    errors = result.stderr.splitlines()
    assert [error.startswith("Error: ") for error in errors] == [True] * 3
    assert "'much' is not a number" in errors[0]
    assert "the strength is -1" in errors[1]
    assert result.exit_code == 0


def test_message_that_begins_with_a_slash_is_sent_with_a_second_one(
    run: Run, model: str, answers: Callable[..., str], tmp_path: Path
) -> None:
    sent = ["/etc/hosts says what?", "/help", "//", "/"]
    result = run("chat", model, *GREEDY, stdin="".join(f"/{text}\n/save talk.jsonl\n" for text in sent))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.split("\n")[0] == answers(sent[0])
    said = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["content"] for row in said if row["role"] == "user"] == sent


def test_unknown_command_says_that_it_was_not_sent_and_how_it_would_be(
    run: Run, model: str, answers: Callable[..., str]
) -> None:
    lines = run("chat", model, *GREEDY, stdin=f"/etc/hosts says what?\n{QUERY}\n").stdout.splitlines()
    assert lines[0] == "/etc/hosts is not a command"
    assert lines[1] == "The message was not sent. To send it, begin it with two slashes: //etc/hosts ..."
    assert lines[-1] == answers(QUERY)  # nothing of it is in the conversation
    help_text = run("chat", model, *GREEDY, stdin="/help\n").stdout
    assert sum(line.startswith("//TEXT ") for line in help_text.splitlines()) == 1


def test_command_may_stand_before_a_tab_or_a_line_of_its_own() -> None:
    from alignez_gguf.cli.chat import _Talk
    from alignez_gguf.cli.chat_screen import open_screen

    heard: list[str] = []

    conversation: Any = SimpleNamespace(set_system=lambda text: heard.append(text) or "", reset=None)
    talk = _Talk(conversation, open_screen(quiet=True), compares=False)
    for text in ("/system\tBe kind.", "/system\nBe\nkind.", "/system"):
        talk._command(text)
    assert heard == ["Be kind.", "Be\nkind.", ""]


def test_lines_of_a_pipe_end_at_line_feeds_and_carriage_returns_only(
    run: Run, model: str, tmp_path: Path
) -> None:
    sent = ["How can I\u2028write?", "How\x0ccan I?", "How\x85can\x1cI?", "Fly?"]
    text = "\ufeff" + "\r".join(sent[:2]) + "\r\n\u200b\n" + "\n".join(sent[2:]) + "\r/save talk.jsonl"
    result = run("chat", model, *GREEDY, stdin=text.encode())
    assert (result.exit_code, result.stderr) == (0, "")
    said = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["content"] for row in said if row["role"] == "user"] == sent


def test_line_of_a_pipe_is_answered_before_the_next_one_comes(model: str) -> None:
    command = [*PROGRAM, "chat", model, *GREEDY, "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        for _ in range(2):
            chat.stdin.write(b"/reset\n")
            chat.stdin.flush()
            assert chat.stdout.readline() == b"forgotten\n"
        chat.stdin.close()
        assert chat.wait(60) == 0


def test_strength_without_a_control_is_an_error_and_the_chat_goes_on(run: Run, model: str) -> None:
    result = run("chat", model, *GREEDY, stdin=f"/on\n{QUERY}\n")
    mend = "start the chat with -c FILE, or write /control FILE"
    assert result.stderr == f"Error: no control file was given; {mend}\n"
    assert result.stdout.strip()


def test_bytes_that_are_no_text_do_not_end_the_chat(run: Run, model: str) -> None:
    result = run("chat", model, *GREEDY, stdin=b"na\xefve\n/reset\n")
    assert result.exit_code == 0
    assert "forgotten" in result.stdout


def test_compare_answers_base_and_steered_and_goes_on_from_the_steered_one(
    run: Run, model: str, control: str, answers: Callable[..., str]
) -> None:
    options = ("-c", control, "--strength", "0.3")
    lines = run(
        "chat", model, *GREEDY, *options, "--compare", stdin=f"{QUERY}\n/compare\n/off\n{QUERY}\n"
    ).stdout
    base, steered, said, off, after = lines.splitlines()
    assert base == f"base: {answers(QUERY).strip()}"
    alone = run("chat", model, *GREEDY, *options, stdin=QUERY).stdout.strip()
    assert steered == f"steered: {alone}" != f"steered: {base.removeprefix('base: ')}"
    assert (said, off) == ("one answer", "strength 0")
    assert after == answers(QUERY, (QUERY, alone))


def test_compare_without_a_control_is_refused(run: Run, model: str) -> None:
    result = run("chat", model, *GREEDY, "--compare")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "-c FILE" in result.stderr
    later = run("chat", model, *GREEDY, stdin=f"/compare\n{QUERY}\n")
    assert (later.exit_code, later.stdout) == (0, "base and steered answers\n")
    assert "/control FILE" in later.stderr


def test_system_message_scope_control_and_save(run: Run, model: str, control: str, tmp_path: Path) -> None:
    commands = (
        f"/system Be kind.\n/control {control}\n/scope first:2\n/strength 0.5\n{QUERY}\n/save talk.jsonl\n"
    )
    result = run("chat", model, *GREEDY, stdin=commands)
    assert result.stderr == ""
    system, user, assistant = map(json.loads, (tmp_path / "talk.jsonl").read_text("utf-8").splitlines())
    assert system == {"role": "system", "content": "Be kind."}
    assert user == {"role": "user", "content": QUERY}
    assert (assistant["strength"], assistant["scope"]) == (0.5, "first:2")
    prompt = f"Be kind.\n\n{Templates.from_file(demo.TEMPLATES).plain_prompt(QUERY)}"
    alone = ("-c", control, "--scope", "first:2", "--strength", "0.5", "-p", prompt, "--stop", "\n")
    expected = json.loads(run("generate", model, "--max-tokens", "16", "--quiet", *alone).stdout)[
        "completion"
    ]
    assert assistant["content"] == expected.strip()


class Terminal:
    """The chat in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = pexpect.spawn(
            PROGRAM[0],
            [*PROGRAM[1:], "chat", *arguments, "--threads", "1", "--temperature", "0"],
            # A terminal that is not asked where its cursor is need not answer.
            env=environment(TERM="xterm-256color", PROMPT_TOOLKIT_NO_CPR="1"),  # type: ignore[arg-type]
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            dimensions=(24, 100),
        )

    def wait_for(self, text: str) -> None:
        self.process.expect_exact(text)

    def wait_for_prompt(self) -> None:
        self.process.expect_exact("\x1b[?2004h")  # an editor that takes pasted text asks for its brackets

    def type(self, text: str) -> None:
        self.wait_for_prompt()
        self.process.send(text)

    def output_of(self, text: str) -> str:
        """What is shown between a message and the next prompt, without control sequences."""
        self.type(f"{text}\r")
        self.process.expect_exact("\x1b[?2004l")
        self.process.expect_exact("tokens/s")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.process.before or "")

    def exit_status(self) -> int | None:
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


@pytest.fixture
def endless() -> Iterator[Terminal]:
    # A random model that repeats itself: its greedy answer goes on for minutes, with these templates.
    asked = ("--templates", str(Path(alignez_gguf.__file__).parent / "data" / "paper.toml"))
    terminal = Terminal(str(tiny_model("llama").gguf), "--context", "65536", "--max-tokens", "32768", *asked)
    yield terminal
    terminal.process.close(force=True)


def test_interrupt_stops_the_answer_and_not_the_program(endless: Terminal) -> None:
    endless.wait_for("/help lists what else you can type")
    endless.type("The quick brown fox\r")
    endless.wait_for("qu\ufffd qu\ufffd")
    endless.process.sendintr()
    endless.wait_for("stopped")
    endless.type("/reset\r")
    endless.wait_for("forgotten")
    endless.type("/quit\r")
    assert endless.exit_status() == 0


def test_interrupt_where_nothing_is_answered_ends_the_chat(endless: Terminal) -> None:
    endless.type("\x03")
    assert endless.exit_status() == 0


def test_compare_shows_both_answers_in_columns(control: str, model: str, answers: Callable[..., str]) -> None:
    terminal = Terminal(model, "-c", control, "--strength", "0.3", "--compare", "--max-tokens", "16")
    try:
        shown = terminal.output_of(QUERY).split("┏")[-1]  # the last table is the whole one
        assert [title.strip() for title in shown.splitlines()[1].split("┃")[1:3]] == ["base", "steered"]
        columns = [
            " ".join(" ".join(line.split("│")[column] for line in shown.splitlines() if "│" in line).split())
            for column in (1, 2)
        ]
        assert columns[0] == " ".join(answers(QUERY).split())
        assert columns[1] != columns[0] != ""
    finally:
        terminal.process.close(force=True)


def test_lines_are_joined_by_alt_enter_and_former_ones_come_back(
    model: str, answers: Callable[..., str]
) -> None:
    terminal = Terminal(model, "--max-tokens", "16")
    try:
        first = terminal.output_of("Hello\x1b\r" + QUERY)
        expected = answers(f"Hello\n{QUERY}")
        assert " ".join(expected.split()) in " ".join(first.split())
        terminal.type("/reset\r")
        terminal.wait_for("forgotten")
        again = terminal.output_of("\x1b[A\x1b[A")  # up, up
        assert " ".join(expected.split()) in " ".join(again.split())
    finally:
        terminal.process.close(force=True)


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    from alignez_gguf.cli.chat_screen import _printable

    assert _printable("a\x1b[2Jb\x07c\x9bd\r\n\te") == "a[2Jbcd\n\te"
