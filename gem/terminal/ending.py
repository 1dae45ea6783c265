"""How a command ends: a user's mistake is one line, and so is a bug, whose trace goes to a file."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from gem.errors import UserError, missing_package
from gem.terminal.text import visible

MISTAKE, BUG, READER_GONE = 2, 1, 141


@contextlib.contextmanager
def one_line_endings(debug: bool = False) -> Iterator[None]:
    """Within, an exception becomes a line on standard error and the process's exit code.

    2: a mistake of the user, or memory that is full. 1: a bug; the line names the file with the trace, and `debug`
    shows it. 141: whoever read the output has gone, as with `| head`, which no line is needed for.
    """
    streams_that_take_any_text()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        if debug:
            traceback.print_exc()
        complain(str(error))
        sys.exit(MISTAKE)
    except SystemExit as end:  # typer's own, of a pipe
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        _forget_output()
        sys.exit(READER_GONE)
    except BrokenPipeError:
        _forget_output()
        sys.exit(READER_GONE)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if is_full_memory(error):
            words = " ".join(str(error).split())[:200] or "no more to be had"
            complain(
                f"out of memory: {words}; lower batch sizes or max_completion_length, or set gradient_checkpointing"
            )
            sys.exit(MISTAKE)
        if words := missing_package(error):
            complain(words)
            sys.exit(MISTAKE)
        complain(f"a bug in gem, please report it: {type(error).__name__}: {_first_line(error)}; {_keep_trace(error)}")
        sys.exit(BUG)


def complain(words: str) -> None:
    """`gem: words` to standard error, harmless to a terminal."""
    with contextlib.suppress(OSError, ValueError):  # it may be closed
        print(f"gem: {visible(words)}", file=sys.stderr, flush=True)


def is_full_memory(error: BaseException) -> bool:
    """Python's, or torch's of any device; torch says "can't allocate memory" on a CPU."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in words and "allocate memory" in words)
    )


def streams_that_take_any_text() -> None:
    """A terminal that is not UTF-8 shows what it cannot write as an escape; it is no error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def writes_unicode(stream: Any) -> bool:
    """True where the stream can write every character."""
    return str(getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or "no message"


def _keep_trace(error: BaseException) -> str:
    """Where the trace is."""
    try:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115
            "w", encoding="utf-8", errors="backslashreplace", prefix="gem-bug-", suffix=".txt", delete=False
        )
        with file:
            versions = ", ".join(
                f"{name} {_version(name)}" for name in ("gem-kernels", "torch", "transformers", "triton")
            )
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} Python {platform.python_version()}, {versions}\n")
            file.write(f"{platform.platform()}, in {os.getcwd()}\n{sys.argv}\n\n")
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return "--debug shows its trace"
    return f"its trace is in {file.name} (--debug shows it)"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _forget_output() -> None:
    """Nothing more is written to a pipe without a reader, at exit neither."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
