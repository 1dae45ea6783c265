"""`gem` in this process: its exit code, its output, and what it told of a mistake."""

from __future__ import annotations

import contextlib
import io
import sys
from unittest import mock

from gem import cli


def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
    """(exit code, standard output, standard error); the last without rich's or the terminal's width."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    argv = ["gem", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as exit:
            code = 0 if exit.code is None else exit.code
    return code, out.getvalue(), errors.getvalue()
