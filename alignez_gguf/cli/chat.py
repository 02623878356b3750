"""`alignez-gguf chat`: talk to a model, with the control on or off, or both side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alignez_gguf.cli import options
from alignez_gguf.errors import AlignezError

if TYPE_CHECKING:
    from alignez_gguf.chat import Conversation
    from alignez_gguf.cli.chat_screen import Screen
    from alignez_gguf.prompts.chat_template import FramingChoice

_HELP = """\
/strength S    how much of the edit is applied, from the next answer on
/on, /off      strength 1, strength 0
/scope SCOPE   which tokens are steered: generation, all, or first:N
/control FILE  steer by another control file
/compare       base and steered answers side by side, or no longer
/system TEXT   what the model is told before the conversation; without TEXT nothing
/reset         forget the conversation
/save FILE     write the conversation as JSONL
//TEXT         send a message that begins with a slash: /TEXT
/help          this list
/quit          leave
In a terminal, Alt+Enter begins a new line, and Ctrl-C stops an answer."""


@click.command()
@options.model
@options.control
@options.strength
@options.scope
@click.option("--compare", is_flag=True, help="Answer base and steered side by side.")
@click.option("--system", default="", help="System prompt.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Maximum tokens per answer."
)
@click.option(
    "--temperature", type=options.FiniteRange(0), default=0.7, show_default=True, help="0 is greedy."
)
@click.option("--top-p", type=options.FiniteRange(0, 1, min_open=True), default=0.95, show_default=True)
@options.templates
@options.framing
@options.seed
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the number of physical cores.")
@click.option("--gpu-layers", type=int, default=-1, show_default=True, help="Layers on the GPU; -1 is all.")
@click.option(
    "--context", type=click.IntRange(16), help="Context length in tokens: the longest conversation."
)
@options.rpc
@options.quiet
def chat(
    model: Path,
    control: Path | None,
    strength: float,
    scope: str | None,
    compare: bool,
    system: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    templates: Path | None,
    framing: FramingChoice,
    seed: int,
    threads: int | None,
    gpu_layers: int,
    context: int | None,
    quiet: bool,
) -> None:
    """Talk to MODEL, steered by a control file if one is given. Without a terminal, each line is a message.

    \b
    In the chat:
      /strength S, /on, /off, /scope, /control, /compare, /system, /reset, /save, /help, /quit
      //TEXT sends a message that begins with a slash: /TEXT

    \b
    Example:
      alignez-gguf chat model-Q4_K_M.gguf -c safe.gguf --compare
    """
    from alignez_gguf.chat import Conversation
    from alignez_gguf.cli.chat_screen import open_screen
    from alignez_gguf.control.control_file import ControlFile
    from alignez_gguf.control.edits import check_strength
    from alignez_gguf.control.scope import Scope
    from alignez_gguf.engines.base import Sampling
    from alignez_gguf.prompts.chat_template import ChatTemplate, other_framing

    if compare and control is None:
        raise click.UsageError("--compare needs a control file; give it with -c FILE.")
    check_strength(strength)
    chosen_scope = None if scope is None else Scope.parse(scope)
    loaded = None if control is None else ControlFile.load(control)
    # Two sequences, one of them for the answer to compare with.
    with options.open_engine(model, threads, gpu_layers, 2, context, exact=False) as engine:
        asking = ChatTemplate.of(engine.model, templates, framing)
        sampling = Sampling(min(max_tokens, engine.n_ctx // 2), temperature, top_p, asking.stop)
        conversation = Conversation(engine, asking, sampling, seed, loaded, strength, chosen_scope)
        conversation.set_system(system)
        screen = open_screen(quiet)
        screen.note(f"{engine.info}. /help lists what else you can type.")
        if loaded is not None and (warning := other_framing(loaded.framing, asking.templates.framing)):
            screen.note(warning)
        _Talk(conversation, screen, compare).run()


class _Talk:
    """Messages and commands, until there are no more."""

    def __init__(self, conversation: Conversation, screen: Screen, compares: bool) -> None:
        self._conversation = conversation
        self._screen = screen
        self._compares = compares

    def run(self) -> None:
        for text in self._screen.messages():
            if text == "/quit":
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self._screen.say(self._command(text))
                else:
                    self._answer(text.removeprefix("/"))
            except KeyboardInterrupt:
                self._screen.note("stopped")
            except AlignezError as error:
                click.echo(f"Error: {error}", err=True)

    def _answer(self, message: str) -> None:
        started = time.monotonic()
        if self._compares:
            with self._screen.answers(("base", "steered")) as show:
                completions = list(self._conversation.compare(message, show))
        else:
            with self._screen.answers(("",)) as show:
                completions = [self._conversation.answer(message, lambda piece: show(0, piece))]
        n_tokens = sum(completion.n_tokens for completion in completions)
        told = f"{n_tokens} tokens, {n_tokens / (time.monotonic() - started):.1f} tokens/s"
        if self._conversation.is_closed(completions[-1]):
            told += "; the gate stayed closed, so this is the base model's answer"
        self._screen.note(told)

    def _command(self, text: str) -> str:
        """Do what a line with a slash says, and return what to tell the user."""
        name, *rest = text.split(maxsplit=1)
        argument = "".join(rest)
        conversation = self._conversation
        commands: dict[str, Callable[[], str]] = {
            "/strength": lambda: conversation.set_strength(argument),
            "/on": lambda: conversation.set_strength("1"),
            "/off": lambda: conversation.set_strength("0"),
            "/scope": lambda: conversation.set_scope(argument),
            "/control": lambda: conversation.set_control(argument),
            "/compare": self._toggle_compare,
            "/system": lambda: conversation.set_system(argument),
            "/reset": conversation.reset,
            "/save": lambda: conversation.save(argument),
            "/help": lambda: _HELP,
        }
        if name not in commands:
            return (
                f"{name} is not a command\n"
                f"The message was not sent. To send it, begin it with two slashes: /{name} ...\n{_HELP}"
            )
        return commands[name]()

    def _toggle_compare(self) -> str:
        self._compares = not self._compares
        return "base and steered answers" if self._compares else "one answer"
