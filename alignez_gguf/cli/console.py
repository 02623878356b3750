"""Progress with the time left on standard error; nothing where nobody looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from alignez_gguf.progress import Advance, Reporter, SilentReporter


class ConsoleReporter:
    """Bars on a terminal; elsewhere one line per finished stage."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        return self._bar(title, total) if self._console.is_terminal else self._line(title)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    @contextmanager
    def _bar(self, title: str, total: int | None) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeLeftColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(title, total=total)
            yield lambda steps: progress.advance(task, steps)

    @contextmanager
    def _line(self, title: str) -> Iterator[Advance]:
        started = time.monotonic()
        yield lambda _: None
        self.note(f"{title}: {time.monotonic() - started:.1f} s")


def reporter(quiet: bool) -> Reporter:
    return SilentReporter() if quiet else ConsoleReporter()
