"""The model of a run is asked as it was trained: with its system prompt, and its answers are found in the same way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from gem.config.read import read_yaml
from gem.config.settings import TextSettings
from gem.errors import UserError
from gem.model.opened import ModelLike
from gem.terminal.console import print_warning

KEYS = ("system_prompt", "chain_of_thought", "answer_marker", "answer_span")
Settings = TypeVar("Settings", bound=TextSettings)


def as_in_run(model: ModelLike, settings: Settings, console: Console, **otherwise: Any) -> Settings:
    """`settings`, in which those of `KEYS` that were not given are the run's, where `model` is RUN/model of a run.

    otherwise: what they are where it is not. A system prompt that is given is used as it is: chain_of_thought, which
    would replace it, comes with the run's prompt alone. A config.yaml that cannot be used costs one line.
    """
    given = settings.model_fields_set
    default = {key: value for key, value in otherwise.items() if key not in given}
    config = _config_of(Path(model)) if isinstance(model, str | Path) else None
    if config is None:
        return settings.changed(**default) if default else settings
    try:
        found = _read(config)
        if "system_prompt" in given:
            del found["chain_of_thought"]
        taken = {key: value for key, value in found.items() if key not in given}
        changed = settings.changed(**{**default, **taken})
    except UserError as error:
        why = str(error).removeprefix(f"{config}: ")
        print_warning(console, f"Warning: {config}: {why}; the system prompt and the answer's marks are the defaults")
        return settings.changed(**default) if default else settings
    if names := [key.replace("_", " ") for key in taken if key != "chain_of_thought"]:
        words = f"{', '.join(names[:-1])} and {names[-1]} are those" if len(names) > 1 else f"{names[0]} is that"
        console.print(f"{words[0].upper()}{words[1:]} of {config}", highlight=False, markup=False, soft_wrap=True)
    return changed


def _config_of(model: Path) -> Path | None:
    """config.yaml beside `model`, where that is a directory as a run leaves it: model, or model-20 of fewer steps."""
    try:
        for path in (model.expanduser(), model.expanduser().resolve()):
            config = path.parent / "config.yaml"
            if re.fullmatch(r"model(-\d+)?", path.name) and path.is_dir() and config.is_file():
                return config
    except (OSError, RuntimeError, ValueError):  # no name of a path: `find_model` says so
        pass
    return None


def _read(config: Path) -> dict[str, Any]:
    """`KEYS` of a run's config.yaml, checked; others may be of another version of gem."""
    values = read_yaml(config)
    if not {*KEYS, "output_dir"} <= set(values):
        raise UserError("not the config of a run of gem")
    text = TextSettings(**{key: values[key] for key in KEYS})
    return {key: getattr(text, key) for key in KEYS}
