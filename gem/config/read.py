"""The configuration of a run: read from a YAML file with `--key value` flags on top, checked, saved, printed.

The settings themselves are in settings.py. An unknown key, a value of the wrong type and a value out of range raise
`UserError` with the name, what was expected and what came.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from gem.config.settings import CHOICES, PRESETS, TrainConfig
from gem.errors import UserError

_NOT_EMPTY = ("model", "train_file", "output_dir", "answer_marker", "answer_span")
_LIMITS = {
    "least": ("at least", lambda value, limit: value >= limit),
    "most": ("at most", lambda value, limit: value <= limit),
    "above": ("more than", lambda value, limit: value > limit),
    "below": ("less than", lambda value, limit: value < limit),
}


def load_config(path: str | Path | None, flags: Sequence[str] = (), **overrides: Any) -> TrainConfig:
    """YAML file, then `flags` (["--key", "value", "--key=value", ...]), then `overrides`, each over the one before."""
    values: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    values.update(parse_flags(flags))
    values.update(overrides)
    return build_config(values)


def build_config(values: Mapping[str, Any]) -> TrainConfig:
    """Checks every key and value and returns the config; raises `UserError` on the first that is wrong.

    Keys that are not given take the preset's value, or else the default.
    """
    hints = typing.get_type_hints(TrainConfig)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            raise UserError(f"config: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    preset = _typed("preset", values.get("preset", "paper"), hints["preset"])
    merged = {**PRESETS[preset], **values}
    config = TrainConfig(**{key: _typed(key, value, hints[key]) for key, value in merged.items()})
    _check_ranges(config)
    return config


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """["--max-steps", "3", "--seed=1"] -> {"max_steps": 3, "seed": 1}; values are read as YAML scalars."""
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"flags: expected --key value, got {flag!r}")
        key, has_value, text = flag[2:].partition("=")
        key = key.replace("-", "_")
        if not has_value:
            if not rest:
                raise UserError(f"--{key}: expected a value, got none")
            text = rest.pop(0)
        values[key] = _scalar(key, text)
    return values


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML; `gem train` reads it back to the same config."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def commented_config(preset: str = "paper") -> str:
    """Every setting with its default under `preset` and its meaning, as a YAML file to start from."""
    if preset not in PRESETS:
        raise UserError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    lines = ["# What is set here stands over the preset; lines left out take the preset's value."]
    for field in dataclasses.fields(TrainConfig):
        value = preset if field.name == "preset" else PRESETS[preset].get(field.name, field.default)
        if field.metadata["section"]:
            lines += ["", *textwrap.wrap(f"{field.metadata['section']}", 110, initial_indent="## ")]
        choices = f" ({' | '.join(typing.get_args(_hint(field.name)))})" if _is_literal(_hint(field.name)) else ""
        lines += textwrap.wrap(
            f"{field.metadata['help']}{choices}", 110, initial_indent="# ", subsequent_indent="#   ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        value = list(value) if isinstance(value, tuple) else value
        dumped = yaml.safe_dump(value, width=1000, allow_unicode=True, default_flow_style=True)
        lines.append(f"{field.name}: {dumped.splitlines()[0]}")  # a lone scalar is followed by "..."
    return "\n".join(lines).strip("\n") + "\n"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def _hint(key: str) -> Any:
    return typing.get_type_hints(TrainConfig).get(key)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _scalar(key: str, text: str) -> Any:
    hint = _hint(key)
    if hint is str or _is_literal(hint) or typing.get_origin(hint) is tuple:
        return text  # a string stays what was typed: no YAML reading of "no" or "1e3"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: an int is a float, "1e-5" (a string in YAML 1.1) is a float, "a,b" is a list."""
    if _is_literal(hint):
        if value not in typing.get_args(hint) or not isinstance(value, str):
            # YAML 1.1 reads a bare `off` as false.
            if value is False and "off" in typing.get_args(hint):
                return "off"
            raise UserError(f"config: {key}: expected one of {', '.join(typing.get_args(hint))}, got {value!r}")
        return value
    if typing.get_origin(hint) is tuple:
        return _names(key, value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in kinds:
        return value
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise UserError(f"config: {key}: expected {names}, got {value!r}")


def _names(key: str, value: Any) -> tuple[str, ...]:
    """A list of names; a string is split at its commas, but one that begins with "regex:" is one pattern."""
    if isinstance(value, str):
        if value.startswith("["):
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"config: {key}: not a list: {value!r}") from error
        else:
            parts = [value] if value.startswith("regex:") else value.split(",")
            value = [part.strip() for part in parts if part.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise UserError(f"config: {key}: expected a list of {', '.join(CHOICES[key])}, got {value!r}")
    for part in value:
        if not any(_is_choice(part, choice) for choice in CHOICES[key]):
            raise UserError(f"config: {key}: expected {', '.join(CHOICES[key])}, got {part!r}")
    return tuple(value)


def _is_choice(part: str, choice: str) -> bool:
    if choice == "last_tokens:N":
        return re.fullmatch(r"last_tokens:[1-9]\d*", part) is not None
    if choice == "regex:PATTERN":
        try:
            return part.startswith("regex:") and bool(re.compile(part[len("regex:") :]).pattern)
        except re.error as error:
            raise UserError(f"config: answer_span: {part!r} is not a regular expression: {error}") from error
    return part == choice


def _check_ranges(config: TrainConfig) -> None:
    for field in dataclasses.fields(config):
        key, value = field.name, getattr(config, field.name)
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise UserError(f"config: {key}: expected a finite number, got {value}")
        if key in _NOT_EMPTY and not (value.strip() if isinstance(value, str) else value):
            raise UserError(f"config: {key}: expected a value, got nothing; set it in the file or with --{key}")
        for name, limit in field.metadata["limits"].items():
            words, holds = _LIMITS[name]
            if value is not None and not holds(value, limit):
                raise UserError(f"config: {key}: expected {words} {limit}, got {value}")
    if isinstance(config.top_m, float) and config.top_m > 1:
        raise UserError(f"config: top_m: expected a share up to 1.0 or a whole count, got {config.top_m}")
    if config.max_steps > 0 and config.objective != "dpo" and config.num_generations < 2:
        raise UserError(f"config: num_generations: expected at least 2 to compare, got {config.num_generations}")
    if config.epsilon_high is not None and config.epsilon is None:
        raise UserError("config: epsilon_high: expected epsilon with it, got none; set epsilon, or leave both out")
    if config.load_in_4bit and not config.use_peft:
        raise UserError("config: load_in_4bit: 4-bit weights cannot be trained; set use_peft: true with it")
    if config.overlong_buffer > config.max_completion_length:
        raise UserError(
            f"config: overlong_buffer: expected at most max_completion_length ({config.max_completion_length}), "
            f"got {config.overlong_buffer}"
        )
