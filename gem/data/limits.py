"""A time limit on what foreign text makes run: a pattern of regular expressions, a chat template."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from gem.errors import UserError

SECONDS = 5.0


@contextlib.contextmanager
def time_limit(words: str, seconds: float | None = None) -> Iterator[None]:
    """`UserError` of `words` once the block has taken so many seconds of this process's CPU time.

    By a timer's signal, which Python's regular expressions look at too. A program that uses SIGVTALRM itself, or calls
    from another thread than the main one, or on Windows, has no limit.
    """
    seconds = SECONDS if seconds is None else seconds
    timer = getattr(signal, "ITIMER_VIRTUAL", None)
    if timer is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL:
        yield
        return

    def stop(*_: Any) -> None:
        raise UserError(f"{words} took more than {seconds:g} s")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
