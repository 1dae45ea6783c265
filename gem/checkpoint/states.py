"""Checkpoints: whatever is in a run's folder under its final name is whole, and says by checksums that it still is.

A checkpoint is a directory `checkpoint-N` (N optimizer steps taken in all) of three files: `model.safetensors`, the
parameters that are trained (under LoRA the adapters alone); `state.pt`, everything else that the rest of the run
depends on; and `checksums.json`, SHA-256 and size of both, with the other directories of the run that it needs. It is
written beside its name, flushed to the disk and renamed, so a name that exists is a whole checkpoint, whenever the
process or the machine died. `state.pt` holds tensors, numbers, strings, lists and dicts, and is read with
`weights_only=True`: no foreign pickle runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from gem.checkpoint.folder import begin_again, continue_command
from gem.errors import UserError
from gem.files import remove_directory, write_directory
from gem.model.load import save_pretrained
from gem.parallel import processes

VERSION = 2
WEIGHTS, STATE, CHECKSUMS = "model.safetensors", "state.pt", "checksums.json"
_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
_NEEDED = re.compile(r"best-[0-9]{1,18}|starting-policy|before-objective")


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

    write_directory(path, fill, f"cannot save the model to {path}", f"; {where_to_continue(path.parent)}")
    return path


def save_checkpoint(
    run_dir: Path,
    step: int,
    parameters: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
    needs: Collection[str] = (),
) -> Path:
    """Writes checkpoint-`step` and then removes all but the newest `keep`; a failure leaves those before as they were.

    Written by the main process alone; `parameters` and `state` are gathered before (`trained_parameters`). needs: the
    other directories of the run that this checkpoint speaks of.
    """
    path = run_dir / f"checkpoint-{step}"
    save_state(path, parameters, state, needs, f"; {where_to_continue(run_dir)}")
    for old in checkpoints(run_dir)[:-keep]:
        remove_directory(old)
    return path


def save_state(
    path: Path,
    parameters: dict[str, torch.Tensor],
    state: dict[str, Any],
    needs: Collection[str] = (),
    then: str = "",
) -> None:
    """The three files of a checkpoint as directory `path`, whole or not at all; `then` ends the error's message."""

    def fill(part: Path) -> None:
        part.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in parameters.items()}
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        torch.save(state, part / STATE)
        files = {name: _identity(part / name) for name in (WEIGHTS, STATE)}
        text = json.dumps({"version": VERSION, "files": files, "needs": sorted(needs)}, indent=1)
        (part / CHECKSUMS).write_text(text + "\n", encoding="utf-8")

    write_directory(path, fill, f"cannot save {path}", then)


def where_to_continue(run_dir: Path) -> str:
    """What is left of a run that could not write, and what to do."""
    kept = checkpoints(run_dir)
    if not kept:
        return f"there is no checkpoint yet: make room for one, remove {run_dir} and begin again"
    return f"the last good checkpoint is {kept[-1].name}: free some space and continue: {continue_command(run_dir)}"


def newest_whole(run_dir: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint whose files are what was written, and what is wrong with each of those that are newer.

    Raises where there is none, and where the newest was written by another version.
    """
    broken: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        problem = what_is_broken(path)
        if problem is None:
            return path, broken
        broken.append(problem)
    raise UserError(f"resume: no checkpoint of {run_dir} is whole: {'; '.join(broken)}; {begin_again(run_dir)}")


def what_is_broken(path: Path) -> str | None:
    """Which file of a checkpoint, or of a directory that it needs, is not what was written; None: it is whole."""
    try:
        record = _read_checksums(path)
        found = next(_wrong_files(path, record), None)
        for name in record["needs"]:
            if found is None:
                other = path.with_name(name)
                found = next(_wrong_files(other, _read_checksums(other)), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        return f"{path.name} is broken: {CHECKSUMS} cannot be read ({why})"
    return found and f"{path.name} is broken: {found}"


def needed_directories(run_dir: Path) -> set[str]:
    """The directories that some checkpoint of the run speaks of."""
    needed: set[str] = set()
    for path in checkpoints(run_dir):
        try:
            needed.update(_read_checksums(path)["needs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
            continue  # a broken one needs nothing
    return needed


def remove_others(run_dir: Path, pattern: str, keep: Collection[str] = ()) -> None:
    """Removes the directories of the run that match `pattern`, but for those of `keep`."""
    for path in run_dir.glob(pattern):
        if path.name not in keep:
            remove_directory(path)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(parameters, state) of a checkpoint, on the CPU."""
    try:
        parameters = load_file(path / WEIGHTS)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        words = " ".join(str(error).split())[:200]
        if "Weights only load failed" in words:
            words = f"{STATE} holds more than tensors, numbers and texts, and nothing else is opened"
        raise UserError(f"resume: cannot read {path}: {words}; remove it to continue from the one before") from error
    return parameters, state


def check_state(path: Path, state: Any) -> None:
    """Raises unless `state` is one of this version, with counts that can be: its values go into paths and files."""

    def refuse(what: str) -> None:
        raise UserError(f"resume: {path / STATE}: {what}; remove {path.name} to continue from the one before")

    if not isinstance(state, dict) or not isinstance(state.get("progress"), dict):
        refuse("it holds no state of a run")
    _check_version(path / STATE, state.get("version"))
    if missing := {"data", "score", "random", "offsets", "machine", "stage_state"} - set(state):
        refuse(f"{min(missing)} is missing")
    progress, stage = state["progress"], state.get("stage_state") or {}
    trainer = stage.get("trainer") or {}
    counts = {name: progress.get(name) for name in ("step", "total_steps")}
    counts |= {name: trainer[name] for name in ("num_steps", "bad_steps") if name in trainer}
    counts |= {f"offset of {name}": value for name, value in dict(state.get("offsets") or {}).items()}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            refuse(f"{name}: expected a whole number, not negative, got {value!r}")
    if path.name != f"checkpoint-{progress['total_steps']}":
        refuse(f"total_steps is {progress['total_steps']}, which is not what the directory is named")
    best = progress.get("best")
    if best is not None and not (isinstance(best, str) and re.fullmatch("best-[0-9]{1,18}", best)):
        refuse(f"best: expected the name of a directory such as best-4, got {best!r}")


@contextlib.contextmanager
def fitting(name: str) -> Iterator[None]:
    """What a checkpoint's state makes fail is the checkpoint's fault: whole files can hold what fits no run."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"resume: {name} holds a state that does not fit this run ({why}); remove it to use the one before"
        ) from error


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run by their names, oldest first."""
    found = [(int(m.group(1)), path) for path in run_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_leftovers(run_dir: Path) -> None:
    """What a kill in the middle of writing or removing a directory or a file left."""
    for path in (*run_dir.glob(".*.part"), *run_dir.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


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
        if not processes.is_sharded(model) and parameter.shape != parameters[name].shape:
            raise UserError(f"resume: {name} of the checkpoint has other sizes than the model's")
        processes.set_parameter(parameter, parameters[name])


def _identity(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _read_checksums(path: Path) -> dict[str, Any]:
    record = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    _check_version(path / CHECKSUMS, record["version"])
    if set(record["files"]) != {WEIGHTS, STATE} or not all(_NEEDED.fullmatch(name) for name in record["needs"]):
        raise ValueError("names of files that a checkpoint does not have")
    return record


def _wrong_files(path: Path, record: dict[str, Any]) -> Iterator[str]:
    where = "" if _NAME.fullmatch(path.name) else f"{path.name}/"
    for name, expected in record["files"].items():
        try:
            found = _identity(path / name)
        except OSError as error:
            yield f"{where}{name} cannot be read ({error.strerror})"
            continue
        if found["bytes"] != expected["bytes"]:
            yield f"{where}{name} has {found['bytes']} bytes, not the {expected['bytes']} that were written"
        elif found != expected:
            yield f"{where}{name} is not what was written (its checksum differs)"


def _check_version(path: Path, version: Any) -> None:
    if version != VERSION:
        raise UserError(
            f"resume: {path} is of format {version!r}, and this gem reads format {VERSION}; continue with the version "
            "of gem that wrote it"
        )
