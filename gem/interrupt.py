"""Signals: one line and an exit code of 128 + the signal's number; a training first saves a checkpoint.

Imports nothing heavy: the command line sets this up before anything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from gem.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def end_with_a_line() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and SIGHUP raise `Interrupted`. One that is ignored (nohup) stays ignored.

    Afterwards the process ends, and a signal ends it at once: Python's own handler would raise within what runs at the
    exit, and print a trace.
    """
    mine = [number for number in SIGNALS if _can_be_set(number)]
    for number in mine:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


class Interrupt:
    """Within `with Interrupt() as interrupt:` the first signal sets `interrupt.signal` and says so on standard error;
    a second one raises `Interrupted` there and then, and a third does what it did before.

    torchrun hands one Ctrl-C on to its processes a second time; under it, what comes within two seconds is the same.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._first = 0.0
        self._same = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0  # seconds
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            if _can_be_set(number):
                self._before[number] = signal.signal(number, self.take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def take(self, number: int, frame: FrameType | None = None) -> None:
        if self.signal is None:
            self.signal, self._first = number, time.monotonic()
            words = f"gem: {name_of(number)}: the run ends after this step, with a checkpoint; once more: at once\n"
            with contextlib.suppress(OSError):  # no printing here: a handler may run in the midst of it
                os.write(2, words.encode())
        elif time.monotonic() - self._first >= self._same:
            self.__exit__()
            raise Interrupted(number)


def name_of(number: int) -> str:
    return signal.Signals(number).name


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _can_be_set(number: int) -> bool:
    """Signals belong to the main thread; one that is ignored, or that other code than Python's handles, stays so."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(number) not in (signal.SIG_IGN, None)
