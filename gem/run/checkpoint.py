"""A run's directory: made once, never written over; whatever is in it under its final name is whole.

A checkpoint is a directory `checkpoint-N` (N optimizer steps taken in all) of two files: `model.safetensors`, the
parameters that are trained (under LoRA the adapters alone), and `state.pt`, everything else that the rest of the run
depends on. It is written beside its name, flushed to the disk and renamed, so a name that exists is a whole
checkpoint, whenever the process or the machine died. `state.pt` holds tensors, numbers, strings, lists and dicts, and
is read with `weights_only=True`: no foreign pickle runs.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import types
import typing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from gem.errors import UserError
from gem.files import remove_directory, write_directory
from gem.model.load import save_pretrained
from gem.parallel import processes

_NAME = re.compile(r"checkpoint-(\d+)")


def check_run_directory(path: str | Path) -> Path:
    """The path, if a run may begin there: it does not exist, or is an empty directory. Creates nothing."""
    directory = Path(path).expanduser()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir: {path} is a file; give the name of a new directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"output_dir: {path} is not empty; give the name of a new directory, remove it first, "
            "or continue the run in it with --resume"
        )
    return directory


def make_run_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot create {path}: {error.strerror}") from error
    return path


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """Writes the model beside `path` and renames it there when it is complete; a cut-off save leaves no `path`.

    weights: of a sharded model, gathered (`processes.whole_state_dict`).
    """

    def fill(part: Path) -> None:
        if weights is None:
            save_pretrained(model, tokenizer, part)
        else:
            save_pretrained(model, tokenizer, part, weights)

    write_directory(path, fill, f"cannot save the model to {path}")
    return path


def save_checkpoint(
    run_dir: Path, step: int, parameters: dict[str, torch.Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Writes checkpoint-`step` and then removes all but the newest `keep`; a failure leaves those before as they were.

    Written by the main process alone; `parameters` and `state` are gathered before (`trained_parameters`).
    """
    path = run_dir / f"checkpoint-{step}"
    kept = checkpoints(run_dir)
    last = f"; the last good checkpoint is {kept[-1].name}" if kept else ""
    save_state(path, parameters, state, f"{last}; free some space and continue with --resume")
    for old in checkpoints(run_dir)[:-keep]:
        remove_directory(old)
    return path


def save_state(path: Path, parameters: dict[str, torch.Tensor], state: dict[str, Any], then: str = "") -> None:
    """The two files of a checkpoint as directory `path`, whole or not at all; `then` ends the error's message."""

    def fill(part: Path) -> None:
        part.mkdir()
        save_file(parameters, part / "model.safetensors", metadata={"format": "pt"})
        torch.save(state, part / "state.pt")

    write_directory(path, fill, f"cannot save {path}", then)


def remove_others(run_dir: Path, pattern: str, keep: str | None) -> None:
    """Removes the directories of the run that match `pattern`, but for `keep`."""
    for path in run_dir.glob(pattern):
        if path.name != keep:
            remove_directory(path)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(parameters, state) of a checkpoint, on the CPU."""
    try:
        parameters = load_file(path / "model.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        words = " ".join(str(error).split())[:200]
        raise UserError(f"resume: cannot read {path}: {words}; remove it to continue from the one before") from error
    return parameters, state


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [(int(m.group(1)), path) for path in run_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_leftovers(run_dir: Path) -> None:
    """What a kill in the middle of writing or removing a directory left."""
    for path in (*run_dir.glob(".*.part"), *run_dir.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True)


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> whole tensor on the CPU of every parameter that is trained. A collective where they are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = processes.whole_tensor(parameter).cpu().clone().contiguous()
    return found


def restore_parameters(model: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained.keys() != parameters.keys():
        odd = sorted(trained.keys() ^ parameters.keys())
        raise UserError(f"resume: the checkpoint holds other parameters than the model: {', '.join(odd[:3])}")
    for name, parameter in trained.items():
        processes.set_parameter(parameter, parameters[name])


def to_tree(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, all the way down: what `torch.load(weights_only=True)` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    return value


def from_tree(hint: Any, tree: Any) -> Any:
    """What `to_tree` made of a value of type `hint`, as that type again."""
    if tree is None:
        return None
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{name: from_tree(hints[name], item) for name, item in tree.items()})
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is tuple:
        return tuple(from_tree(parts[0], item) for item in tree)
    if kind is dict:
        return {key: from_tree(parts[1], item) for key, item in tree.items()}
    return tree
