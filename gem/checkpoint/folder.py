"""A run's folder: made once, never written over, one process at a time, and nothing in it leads out of it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from gem.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The links that wandb makes in its own folder, which nothing here opens.
_WANDB_LINKS = ("latest-run", "debug.log", "debug-internal.log", "debug-core.log")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_run_directory(path: str | Path) -> Path:
    """The path, if a run may begin there: it does not exist, or is an empty directory. Creates nothing."""
    directory = Path(path).expanduser()
    with _readable(directory):
        if directory.exists() and not directory.is_dir():
            raise UserError(f"output_dir: {path} is a file; give the name of a new directory")
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"output_dir: {path} is not empty; give the name of a new directory, remove it first, "
                "or continue the run in it with --resume"
            )
    return directory


def continue_command(run_dir: Path) -> str:
    """What goes on with a run, whether it was begun with a file or with flags alone: its folder has its settings."""
    return f"gem train {shlex.quote(str(run_dir / 'config.yaml'))} --resume"


def begin_again(run_dir: Path) -> str:
    """What to do with a run that has no checkpoint to go on from; a model that it holds is not thrown away."""
    models = sorted(path for path in run_dir.glob("model*") if path.is_dir())
    if not models:
        return "remove it and start the run without --resume"
    return f"to train its model further start a new run with another output_dir and model: {models[0]}"


class RunFolder:
    """The folder of a run while this process has it: `close` lets go of it, `undo` takes a beginning back.

    The lock is the kernel's, on the directory itself: it leaves no file and goes with the process, however that ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []  # of the path and its parents, innermost first
        self._fresh = False
        self._lock: int | None = None

    def begin(self) -> None:
        """Makes the directory and takes it. It must be empty then too: another run may have begun since the check."""
        self._made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: cannot create {self.path}: {error.strerror}") from error
        try:
            self.take()
            check_run_directory(self.path)
        except UserError:
            self._made = []  # they are another run's by now
            self.close()
            raise
        self._fresh = True

    def take(self) -> None:
        """One UserError where another process has the folder. Without a lock on file systems that know none."""
        if fcntl is None:
            return
        with _readable(self.path):
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UserError(
                f"output_dir: another process is training in {self.path}; wait for it, or give another output_dir"
            ) from error
        except OSError:
            os.close(lock)
            return
        self._lock = lock

    def undo(self) -> None:
        """Removes what a run that could not begin has made; a run that was there already is left as it is."""
        if self._fresh:
            for place in self.path.iterdir():
                shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it by now
                for place in self._made:
                    place.rmdir()
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def refuse_links(run_dir: Path) -> None:
    """Raises for anything in a run's folder but plain files and directories: whoever made the folder could have what
    is written there land elsewhere."""
    with _readable(run_dir):
        for root, folders, names in os.walk(run_dir, onerror=_raise):
            for name in (*folders, *names):
                path = Path(root, name)
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                    continue
                if name in _WANDB_LINKS and _is_of_wandb(path.parent, run_dir / "wandb"):
                    continue
                what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a directory"
                raise UserError(f"resume: {path} is {what}, and none is followed in a run's folder; remove it")


def _is_of_wandb(folder: Path, wandb: Path) -> bool:
    """wandb's own folder, or that of the logs of one of its runs: links stand there, which nothing here writes to."""
    return folder == wandb or (folder.name == "logs" and folder.parent.parent == wandb)


def read_id(path: Path) -> str | None:
    """The id that a service gave a run; None where there is none. It becomes part of paths, so it is looked at."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"resume: cannot read {path}: {error.strerror}") from error
    if not _ID.fullmatch(text):
        raise UserError(f"resume: {path} holds no id of a run (letters, digits, - and _); remove it to begin a new one")
    return text


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir: cannot read {error.filename or path}: {error.strerror}") from error
