"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gem.errors import UserError

if TYPE_CHECKING:
    import torch


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_lines(path: Path, lines: Iterable[str], what: str = "cannot write", then: str = "") -> None:
    """A file of these lines beside `path`, which takes that name once it is whole and on the disk.

    A failure to write is a UserError of `what`, the path, the reason, and `then`; what the lines raise is theirs. Then
    nothing is left behind, and a file that was there is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _as_user_error(what, path, then):
            file = part.open("w", encoding="utf-8")
        try:
            for line in lines:
                with _as_user_error(what, path, then):
                    file.write(line)
            with _as_user_error(what, path, then):
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                file.close()
        with _as_user_error(what, path, then):
            part.replace(path)
            _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def _as_user_error(what: str, path: Path, then: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror or error}{then}") from error


def write_directory(path: Path, fill: Callable[[Path], None], what: str, then: str = "") -> None:
    """`fill` writes a new directory beside `path`, which takes that name once it is on the disk.

    A directory that bears the name already is replaced. Any failure to write removes what was written and is a
    UserError of `what`, the reason, and `then`.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fill(part)
        for file in (*part.rglob("*"), part):
            _flush(file)
        if path.exists():
            path.rename(old)
        part.rename(path)
        _flush(path.parent)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        if not _is_write_failure(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        if "inline_container" in reason:
            reason = "fewer bytes reached the disk than were written (is it full?)"
        raise UserError(f"{what}: {reason}{then}") from error
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Out of its name first, so that a removal cut short leaves no half of a checkpoint under it."""
    gone = path.with_name(f".{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A directory of `model.safetensors` alone, whole or not at all."""
    from safetensors.torch import save_file  # imports torch, which no one who writes text needs

    def fill(part: Path) -> None:
        part.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "model.safetensors")

    write_directory(path, fill, f"cannot save {path}")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path / "model.safetensors")
    except Exception as error:
        raise UserError(f"resume: cannot read {path}: {' '.join(str(error).split())[:200]}") from error


def _flush(path: Path) -> None:
    """Until a file and its name are on the disk, a rename may outlive the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_write_failure(error: Exception) -> bool:
    """OSError, or what safetensors and torch make of one: both say little by type and much in words."""
    words = str(error).lower()
    return isinstance(error, OSError) or any(
        hint in words
        for hint in (
            *("no space", "os error", "i/o error", "ioerror", "write failed", "iostream", "pwrite"),
            "inline_container",  # torch.save, of fewer bytes than it wrote
        )
    )
