"""The configuration of a run: read from a YAML file with `--key value` flags on top, saved, printed."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gem.config.plain_yaml import load_yaml
from gem.config.section import choices_of
from gem.config.settings import PRESETS, TrainConfig
from gem.errors import UserError, path_of, short

# What stands for a boolean in a command line: YAML's words, and those of transformers' HfArgumentParser.
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}


def load_config(path: str | Path | None, flags: Sequence[str] = (), **overrides: Any) -> TrainConfig:
    """YAML file, then `flags` (["--key", "value", "--key=value", ...]), then `overrides`, each over the one before."""
    values: dict[str, Any] = {} if path is None else read_yaml(Path(path))
    values.update(parse_flags(flags))
    values.update(overrides)
    return build_config(values)


def load_command_line(words: Sequence[str]) -> TrainConfig:
    """The words of a command, `[CONFIG] [--key value ...]` in any order, as `load_config` takes them."""
    paths: list[str] = []
    flags: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            paths.append(word)
            continue
        flags.append(word)
        if rest and _takes_next(word, rest):
            flags.append(rest.pop(0))
    if len(paths) > 1:
        raise UserError(f"flags: expected one config and then --key value, got {short(paths[1])}")
    return load_config(paths[0] if paths else None, flags)


def build_config(values: Mapping[str, Any]) -> TrainConfig:
    """Checks every key and value and returns the config; raises `UserError` on the first that is wrong.

    Keys that are not given take the preset's value, or else the default.
    """
    named = {key if isinstance(key, str) else short(key): value for key, value in values.items()}
    preset = named.get("preset")
    return TrainConfig(**{**PRESETS.get(preset if isinstance(preset, str) else "", {}), **named})


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """["--max-steps", "3", "--seed=1"] -> {"max_steps": 3, "seed": 1}; values are read as YAML scalars.

    A boolean setting may stand alone: ["--use_peft"] -> {"use_peft": True}.
    """
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"flags: expected --key value, got {short(flag)}")
        key, has_value, text = flag[2:].partition("=")
        key = key.replace("-", "_")
        if not has_value and _takes_next(flag, rest):
            if not rest:
                raise UserError(f"--{key}: expected a value, got none")
            text = rest.pop(0)
        elif not has_value:
            text = "true"
        values[key] = _scalar(key, text)
    return values


def config_text(config: TrainConfig) -> str:
    """The resolved configuration as YAML; `gem train` reads it back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def commented_config(preset: str = "paper") -> str:
    """Every setting with its default under `preset` and its meaning, as a YAML file to start from."""
    if preset not in PRESETS:
        raise UserError(f"--preset: expected one of {', '.join(PRESETS)}, got {short(preset)}")
    lines = ["# What is set here stands over the preset; lines left out take the preset's value."]
    for name, field in TrainConfig.model_fields.items():
        value = preset if name == "preset" else PRESETS[preset].get(name, field.default)
        if field.json_schema_extra["section"]:
            lines += ["", *textwrap.wrap(field.json_schema_extra["section"], 110, initial_indent="## ")]
        choices = f" ({' | '.join(words)})" if (words := choices_of(field.annotation)) else ""
        lines += textwrap.wrap(
            f"{field.description}{choices}", 110, initial_indent="# ", subsequent_indent="#   ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        value = list(value) if isinstance(value, tuple) else value
        dumped = yaml.safe_dump(value, width=1000, allow_unicode=True, default_flow_style=True)
        lines.append(f"{name}: {dumped.splitlines()[0]}")  # a lone scalar is followed by "..."
    return "\n".join(lines).strip("\n") + "\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; {} of an empty one."""
    path = path_of(path, "config")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from error
    except ValueError as error:  # of YAML, or of UTF-8
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def _takes_next(flag: str, rest: Sequence[str]) -> bool:
    """Whether the next word is the value of the flag: not after `=`, nor of a boolean that such a word cannot be."""
    if "=" in flag:
        return False
    is_bool = _hint(flag[2:].replace("-", "_")) is bool
    return not is_bool or bool(rest and rest[0].lower() in _BOOLEANS)


def _hint(key: str) -> Any:
    field = TrainConfig.model_fields.get(key)
    return field and field.annotation


def _scalar(key: str, text: str) -> Any:
    hint = _hint(key)
    if hint is bool and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if hint is str or choices_of(hint) or typing.get_origin(hint) is tuple:
        return text  # a string stays what was typed: no YAML reading of "no" or "1e3"
    try:
        return load_yaml(text)
    except ValueError:
        return text
