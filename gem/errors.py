"""What ends a command: a mistake that the user can put right (exit code 2), or a signal (128 + its number)."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A mistake in a configuration, a data file or a path; its message says where it is and what to do."""


class Interrupted(BaseException):
    """A signal ended the work; the message says what is left. No KeyboardInterrupt: typer would end that in silence."""

    def __init__(self, number: int, words: str = "") -> None:
        self.number = number
        super().__init__(f"ended by {signal.Signals(number).name}{words}")

    @property
    def exit_code(self) -> int:
        return 128 + self.number
