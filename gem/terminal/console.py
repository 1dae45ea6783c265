"""rich's console, which shows text as it is: no markup, no emoji codes, nothing that drives the terminal."""

from __future__ import annotations

import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from gem.errors import UserError
from gem.terminal.text import visible

LEVELS = ("debug", "info", "warning", "error")
# Lines that begin like these are warnings; all others tell what is going on.
_WARNINGS = ("warning", "guard ", "gate: ", "interrupted")
_level = "info"


def set_level(level: str) -> None:
    """What the consoles of this process print: all (debug, info), warnings, or nothing but the error at the end."""
    global _level
    if level not in LEVELS:
        raise UserError(f"--log-level: expected one of {', '.join(LEVELS)}, got {level!r}")
    _level = level


def level() -> str:
    return _level


class PlainConsole(Console):
    """result: what it prints is what a command was asked for, which no level leaves out.

    python_warnings: nothing is printed, and its warnings are Python's.
    """

    def __init__(self, *, result: bool = False, python_warnings: bool = False, **arguments: Any) -> None:
        super().__init__(markup=False, emoji=False, **({"quiet": True} if python_warnings else {}), **arguments)
        self.result, self.python_warnings = result, python_warnings

    def render_str(self, text: str, **arguments: Any) -> Text:
        return super().render_str(visible(text), **{**arguments, "markup": False, "emoji": False})

    def print(self, *objects: Any, **arguments: Any) -> None:
        if self.python_warnings:
            if _is_warning(objects):
                self.warn(objects[0])
        elif self.result or level() in ("debug", "info") or (level() == "warning" and _is_warning(objects)):
            self.show(*objects, **arguments)

    def show(self, *objects: Any, **arguments: Any) -> None:
        """At every level."""
        super().print(*objects, **{**arguments, "markup": False, "emoji": False})

    def warn(self, words: str) -> None:
        """A line that the level `warning` keeps, whatever it begins with."""
        if self.python_warnings:
            warnings.warn(words, stacklevel=2)
        elif self.result or level() != "error":
            self.show(words, highlight=False, soft_wrap=True)


def print_warning(console: Console, words: str) -> None:
    """To any console of rich's."""
    if isinstance(console, PlainConsole):
        console.warn(words)
    else:
        console.print(words, highlight=False, markup=False, soft_wrap=True)


def print_result(console: Console, line: Any) -> None:
    """What a command was asked for, a table or a line, which no level leaves out. To any console of rich's."""
    show = console.show if isinstance(console, PlainConsole) else console.print
    show(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))


def make_console(**arguments: Any) -> Console:
    return PlainConsole(**arguments)


def _is_warning(objects: tuple[Any, ...]) -> bool:
    return bool(objects) and isinstance(objects[0], str) and objects[0].lower().startswith(_WARNINGS)
