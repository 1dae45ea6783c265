"""A run's directory: made once, never written over; whatever is in it under its final name is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gem.errors import UserError
from gem.model import save_pretrained


def check_run_directory(path: str | Path) -> Path:
    """The path, if a run may begin there: it does not exist, or is an empty directory. Creates nothing."""
    directory = Path(path).expanduser()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir: {path} is a file; give the name of a new directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"output_dir: {path} is not empty; give the name of a new directory, or remove it first")
    return directory


def make_run_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot create {path}: {error.strerror}") from error
    return path


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Path:
    """Writes the model beside `path` and renames it there when it is complete; a cut-off save leaves no `path`."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_pretrained(model, tokenizer, part)
        part.rename(path)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot save the model to {path}: {error.strerror or error}") from error
    return path


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each written through as it comes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
