"""What is plainly not there, or in the way, is told at once: nothing here imports torch or transformers."""

from __future__ import annotations

from pathlib import Path

from gem.data.sources import check_source
from gem.errors import UserError, path_of
from gem.model.source import find_model


def check_out(out: Path | None) -> None:
    """Raises where a new file or directory cannot be made."""
    if out is not None and out.exists():
        raise UserError(f"--out: {out} exists; name a new file or remove it first")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out: the directory {out.parent} does not exist")


def check_places(model: str, *sources: str | None, score: str | Path | None = None) -> None:
    """Raises where a name is plainly that of a file or directory which is not there."""
    for source in filter(None, sources):
        check_source(source)
    if score is not None:
        check_score(score)
    find_model(model)


def check_score(score: str | Path, *others: str) -> None:
    """Raises where it is no file. others: what else it may be."""
    if score not in others and not path_of(score, "score").is_file():
        expected = " or ".join((*others, "a score.json of gem calibrate"))
        raise UserError(f"score: expected {expected}; {score}: cannot read it: no such file")
