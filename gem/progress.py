"""Progress of long work: a rich bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from gem.parallel import processes

# Seconds between the lines of one piece of work where there is no terminal.
_LINE_SECONDS = 30.0


class Bar:
    """Counts one piece of work; `advance` is called as parts of it are done, `note` adds a few words."""

    def __init__(self, console: Console, what: str, total: int, bar: RichProgress | None) -> None:
        self.console, self.what, self.total, self.bar = console, what, total, bar
        self.done = 0
        self.words = ""
        self.start = self.last_line = time.monotonic()
        self.task = None if bar is None else bar.add_task(what, total=total, words="")

    def advance(self, parts: int = 1) -> None:
        self.done = min(self.done + parts, self.total)  # processes that share the work count in multiples
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif time.monotonic() - self.last_line > _LINE_SECONDS and self.done < self.total:
            self.last_line = time.monotonic()
            self._line("...")

    def note(self, words: str) -> None:
        self.words = words
        if self.bar is not None:
            self.bar.update(self.task, words=words)

    def finish(self) -> None:
        if self.bar is None:
            self._line("")

    def _line(self, end: str) -> None:
        words = f", {self.words}" if self.words else ""
        seconds = time.monotonic() - self.start
        self.console.print(f"{self.what}: {self.done}/{self.total} in {seconds:.0f} s{words}{end}", highlight=False)


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Bar]:
    """`with progress(console, "SFT", 10) as bar: ... bar.advance()`."""
    if not console.is_terminal:
        counter = Bar(console, what, total, None)
        yield counter
        counter.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[words]}", markup=False),
    )  # fmt: skip
    with RichProgress(*columns, console=console) as bar:
        yield Bar(console, what, total, bar)


def advance(bar: Bar | None, done: int) -> None:
    """Of work that the processes share: each does about as much as this one."""
    if bar is not None:
        bar.advance(done * processes.world_size())
