"""What ends a command: a mistake that the user can put right (exit code 2), or a signal (128 + its number).

And what an error message is made of: a value shown in few words, the path of a name, what an import lacks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any


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


def one_line(error: BaseException) -> str:
    """What another library says of its failure: on one line, never long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def short(value: Any, most: int = 120) -> str:
    """repr of a value for a message: never long, whatever the value; of text the middle is left out."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        if len(parts) > 8 or any(isinstance(part, dict | list | tuple | set | frozenset) for part in parts):
            return f"a {type(value).__name__} of {len(value)}"  # one part may stand in it a million times
        inner = ", ".join(short(part, most) for part in parts)
        return _cut(f"{type(value).__name__} of {inner}" if isinstance(value, dict) else f"[{inner}]", most)
    if isinstance(value, int) and abs(value) >= 10**30:  # its digits may be more than Python writes
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str | bytes) and len(value) > 4 * most:
        return _cut(repr(value[: 2 * most]), most)
    return _cut(repr(value), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


def path_of(name: str | Path, what: str) -> Path:
    """The path of that name, "~" as the home directory; `UserError` where it cannot be looked at. It need not exist."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError as error:
        raise UserError(f"{what}: {name}: there is no such user, so no home directory; write the path out") from error
    except ValueError as error:  # a NUL character, half a character
        raise UserError(f"{what}: {str(name)!r} is no name of a file: {error}") from error
    except OSError as error:
        text = str(name) if len(str(name)) <= 100 else f"{str(name)[:100]}..."
        raise UserError(f"{what}: cannot look at {text!r}: {error.strerror}") from error
    return path


# What the loop imports of pyproject.toml's extra `train`, and what comes with it.
TRAIN_PACKAGES = frozenset({
    "accelerate", "datasets", "gguf", "huggingface_hub", "jinja2", "numpy", "peft", "pydantic", "rich", "safetensors",
    "sklearn", "tensorboard", "transformers", "typer", "typing_extensions", "yaml",
})  # fmt: skip


def missing_package(error: BaseException) -> str | None:
    """What to do where a package of the loop is not installed; None where it is something else."""
    name = str(error.name).partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in TRAIN_PACKAGES:
        return None
    return f"the training loop needs more packages: pip install 'gem-kernels[train]' ({name} is missing)"
