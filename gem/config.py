"""The configuration of a run: one typed dataclass, filled from a YAML file with `--key value` flags on top.

Every field has one meaning, one type and one default. An unknown key, a value of the wrong type and a value out of
range raise `UserError` with the name, what was expected and what came.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gem.errors import UserError

SYSTEM_PROMPT = (
    "Solve the problem step by step, one short step per line. "
    "Then end with 'Final Answer: ' followed by the answer alone."
)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of `gem train`. Batch sizes count prompts unless the name says otherwise."""

    # What is trained on what, and where it goes.
    model: str = ""  # a local directory, a GGUF file (or a directory holding one), or a hub id
    train_file: str = ""  # JSONL of {"prompt", "chosen", "rejected", optional "answer"}
    eval_file: str | None = None  # held-out pairs; none: `eval_fraction` of train_file is held out
    eval_fraction: float = 0.2
    output_dir: str = ""  # the run's directory; must not exist or be empty
    seed: int = 0

    # Prompts and answers.
    system_prompt: str = SYSTEM_PROMPT  # empty: no system prompt
    answer_marker: str = "Final Answer:"
    no_answer: Literal["tail", "exclude"] = "tail"  # span of a completion without the marker: its last fifth, or none

    # Sampling of candidates.
    num_generations: int = 4  # candidates per prompt, G
    max_completion_length: int = 256  # tokens
    temperature: float = 1.0  # of the sampler
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    rollout_batch_size: int = 16  # prompts sampled together (times num_generations sequences)

    # Scores and advantages. Entropies and log-probs are those of the policy at this temperature; 1.0 is the model
    # itself, whatever temperature it was sampled at.
    score_temperature: float = 1.0
    fork_weight: float = 1.0  # lambda of S = -H_final + lambda * H_fork
    top_m: float | int = 0.1  # share (float) or count (int) of the reasoning tokens in H_fork
    reward_mapping: Literal["identity", "softmax", "rank"] = "identity"
    reward_scale: Literal["none", "group"] = "none"
    mask_truncated: bool = False  # leave candidates without an end token out of the group

    # SFT warm start on the chosen answers.
    sft_epochs: int = 1  # 0: no warm start
    sft_learning_rate: float = 2e-5
    sft_batch_size: int = 8  # pairs per optimizer step

    # SEGA.
    max_steps: int = 10  # optimizer steps, each on fresh candidates; 0: none
    prompts_per_step: int = 8
    learning_rate: float = 1e-6
    loss_type: Literal["sum", "mean", "token", "constant"] = "sum"

    # The optimizer, for both.
    micro_batch_size: int = 4  # prompts per forward and backward; the gradient does not depend on it
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "linear"] = "constant"

    # Evaluation, before and after.
    eval_batch_size: int = 8  # prompts per forward or generate batch
    preference_reduction: Literal["sum", "mean"] = "sum"  # implicit reward: log-prob of the answer, whole or per token
    eval_generate: int = 64  # held-out problems answered greedily; 0: none
    eval_sample: int = 16  # held-out prompts with G candidates sampled and scored; 0: none

    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"


# Settings that must be at least this much.
_AT_LEAST: dict[str, float] = {
    "num_generations": 1, "max_completion_length": 1, "temperature": 0, "top_k": 0, "rollout_batch_size": 1,
    "fork_weight": 0, "sft_epochs": 0, "sft_learning_rate": 0, "sft_batch_size": 1, "max_steps": 0,
    "prompts_per_step": 1, "learning_rate": 0, "micro_batch_size": 1, "weight_decay": 0, "warmup_steps": 0,
    "eval_batch_size": 1, "eval_generate": 0, "eval_sample": 0, "seed": 0,
}  # fmt: skip
_POSITIVE = ("max_grad_norm", "score_temperature", "top_p", "eval_fraction", "top_m")
_AT_MOST_ONE = ("top_p",)
_NOT_EMPTY = ("model", "train_file", "output_dir", "answer_marker")


def load_config(path: str | Path | None, flags: Sequence[str] = (), **overrides: Any) -> TrainConfig:
    """YAML file, then `flags` (["--key", "value", "--key=value", ...]), then `overrides`, each over the one before."""
    values: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    values.update(parse_flags(flags))
    values.update(overrides)
    return build_config(values)


def build_config(values: Mapping[str, Any]) -> TrainConfig:
    """Checks every key and value and returns the config; raises `UserError` on the first that is wrong."""
    hints = typing.get_type_hints(TrainConfig)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            raise UserError(f"config: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    config = TrainConfig(**{key: _typed(key, value, hints[key]) for key, value in values.items()})
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


def _scalar(key: str, text: str) -> Any:
    hint = typing.get_type_hints(TrainConfig).get(key)
    if hint is str or typing.get_origin(hint) is Literal:
        return text  # a string stays what was typed: no YAML reading of "no" or "1e3"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: an int is a float, "1e-5" (a string in YAML 1.1) is a float, nothing else moves."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint) or not isinstance(value, str):
            raise UserError(f"config: {key}: expected one of {', '.join(typing.get_args(hint))}, got {value!r}")
        return value
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


def _check_ranges(config: TrainConfig) -> None:
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise UserError(f"config: {key}: expected a finite number, got {value}")
        if key in _NOT_EMPTY and not value.strip():
            raise UserError(f"config: {key}: expected a value, got nothing; set it in the file or with --{key}")
        if key in _AT_LEAST and value < _AT_LEAST[key]:
            raise UserError(f"config: {key}: expected at least {_AT_LEAST[key]}, got {value}")
        if key in _POSITIVE and value <= 0:
            raise UserError(f"config: {key}: expected more than 0, got {value}")
        if key in _AT_MOST_ONE and value > 1:
            raise UserError(f"config: {key}: expected at most 1, got {value}")
    if config.eval_fraction >= 1:
        raise UserError(f"config: eval_fraction: expected less than 1, got {config.eval_fraction}")
    if isinstance(config.top_m, float) and config.top_m > 1:
        raise UserError(f"config: top_m: expected a share up to 1.0 or a whole count, got {config.top_m}")
    if config.max_steps > 0 and config.num_generations < 2:
        raise UserError(f"config: num_generations: expected at least 2 to compare, got {config.num_generations}")
