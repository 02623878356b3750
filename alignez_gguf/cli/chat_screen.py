"""Where a chat is read and shown: a terminal with an editor and markdown, or plain text through pipes."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import TextIOWrapper
from typing import Any, Protocol

import click

from alignez_gguf.prompts.tables import is_blank

_REFRESHES = 8
"""How often in a second what grows is drawn."""

Show = Callable[[int, str], None]
"""Gets the number of an answer and the text that it has grown by."""


class Screen(Protocol):
    def messages(self) -> Iterator[str]:
        """What the user says, stripped and not empty, until the end of the input."""
        ...

    def answers(self, titles: Sequence[str]) -> AbstractContextManager[Show]:
        """Show answers as they grow, one for each title."""
        ...

    def say(self, text: str) -> None:
        """Show what a command has to say."""
        ...

    def note(self, text: str) -> None:
        """Show something that is no part of the conversation."""
        ...


def open_screen(quiet: bool) -> Screen:
    """The terminal, if a person sits at both ends."""
    return _Terminal(quiet) if sys.stdin.isatty() and sys.stdout.isatty() else _Pipe()


class _Pipe:
    """Each line is a message; answers are plain text."""

    def messages(self) -> Iterator[str]:
        lines = TextIOWrapper(sys.stdin.buffer, "utf-8-sig", "replace", newline=None)
        try:
            for line in lines:
                if not is_blank(line):
                    yield line.strip()
        except KeyboardInterrupt:
            return
        finally:
            lines.detach()  # or standard input would be closed with them

    @contextmanager
    def answers(self, titles: Sequence[str]) -> Iterator[Show]:
        if len(titles) == 1:
            yield lambda _, piece: click.echo(piece, nl=False)
            click.echo()
            return
        grown = [""] * len(titles)

        def show(number: int, piece: str) -> None:
            grown[number] += piece

        yield show
        for title, text in zip(titles, grown, strict=True):
            click.echo(f"{title}: {text.strip()}")

    def say(self, text: str) -> None:
        click.echo(text)

    def note(self, text: str) -> None:
        """Nobody looks."""


class _Terminal:
    """An editor with a history for the messages, and markdown for the answers."""

    def __init__(self, quiet: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
        from rich.console import Console

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def new_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        self._console = Console()
        self._session: PromptSession[str] = PromptSession(
            key_bindings=keys, prompt_continuation=lambda width, _, __: " " * width
        )
        self._quiet = quiet

    def messages(self) -> Iterator[str]:
        try:
            while True:
                text = self._session.prompt("> ")
                if not is_blank(text):
                    yield text.strip()
        except (EOFError, KeyboardInterrupt):
            return

    @contextmanager
    def answers(self, titles: Sequence[str]) -> Iterator[Show]:
        from rich.live import Live

        grown = [""] * len(titles)
        # What grows is cut at the height of the terminal, so the whole is printed once more at the end.
        live = Live(
            console=self._console,
            transient=True,
            refresh_per_second=_REFRESHES,
            get_renderable=lambda: self._rendered(titles, grown),
        )

        def show(number: int, piece: str) -> None:
            grown[number] += _printable(piece)

        try:
            with live:
                yield show
        finally:
            self._console.print(self._rendered(titles, grown))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, style="dim", markup=False, highlight=False)

    def _rendered(self, titles: Sequence[str], texts: Sequence[str]) -> Any:
        from rich.markdown import Markdown
        from rich.table import Table

        rendered = [Markdown(text) for text in texts]
        if len(rendered) == 1:
            return rendered[0]
        table = Table(*titles, expand=True, show_lines=False)
        table.add_row(*rendered)
        return table


def _printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) != "Cc")
