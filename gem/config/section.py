"""A section of the settings: a frozen class of typed, bounded values, checked whenever one is made.

A wrong key, type or value is one `UserError` with the key, what was expected and what came. Values may come from YAML
or from flags: an int or "1e-5" (a string in YAML 1.1) is a float, "a,b" is a list, a bare `off` (false in YAML 1.1) is
"off".
"""

from __future__ import annotations

import contextlib
import difflib
import re
import types
import typing
import warnings
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from typing_extensions import Self

from gem.config.plain_yaml import load_yaml
from gem.errors import UserError, short

# The words of the lists of names.
CHOICES: dict[str, tuple[str, ...]] = {
    "report_to": ("tensorboard", "trackio", "wandb"),
    "score_features": (
        *("final_entropy", "fork_entropy", "reasoning_entropy", "mean_entropy", "max_entropy"),
        *("mean_logprob", "sum_logprob", "min_logprob", "length"),
    ),
    "answer_span": ("marker", "boxed", "answer_tag", "after_think", "last_sentence", "last_tokens:N", "regex:PATTERN"),
}
MOST = 10**18  # of whole numbers: what is larger fits no counter
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "less_than": ("less than", "lt"),
}


def setting(default: Any, help: str, *, section: str | None = None, **limits: float) -> Any:
    """A field of a section. limits: `ge`, `le` (included), `gt`, `lt` (excluded). section: the title above it."""
    return Field(default, description=help, json_schema_extra={"section": section, "limits": limits}, **limits)


class Section(BaseModel):
    """Keyword arguments only; what is not given has its default."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        for key in values:
            if key not in fields:
                near = difflib.get_close_matches(key[:100], fields, n=1)
                raise UserError(f"config: unknown key {short(key)}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_words(type(self), error.errors()[0])) from None

    def changed(self, **values: Any) -> Self:
        """The same settings but for these, checked again."""
        return type(self)(**{**self.model_dump(), **values})

    def refuse_empty(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            if not (value.strip() if isinstance(value, str) else value):
                raise UserError(f"config: {key}: expected a value, got nothing; set it in the file or with --{key}")

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: Any) -> Any:
        hint = cls.model_fields[info.field_name].annotation
        kinds = kinds_of(hint)
        if typing.get_origin(hint) is tuple:
            return _names(info.field_name, value)
        if value is False and "off" in choices_of(hint):
            return "off"
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"config: {info.field_name}: not UTF-8 text; write it again")
        if type(value) is int and abs(value) >= MOST:
            raise UserError(f"config: {info.field_name}: expected a number below 10^18, got {short(value)}")
        if float in kinds and isinstance(value, int | str) and type(value) not in (*kinds, bool):
            with contextlib.suppress(ValueError):
                return float(value)
        return value


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words of a Literal, none of anything else."""
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _words(section: type[Section], error: Any) -> str:
    """Pydantic's account of one wrong value, in one line."""
    key, value = error["loc"][0], error["input"]
    field = section.model_fields[key]
    if error["type"] in _LIMITS:
        words, name = _LIMITS[error["type"]]
        return f"config: {key}: expected {words} {field.json_schema_extra['limits'][name]}, got {short(value)}"
    if error["type"] == "finite_number":
        return f"config: {key}: expected a finite number, got {short(value)}"
    if choices := choices_of(field.annotation):
        return f"config: {key}: expected one of {', '.join(choices)}, got {short(value)}"
    names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds_of(field.annotation))
    return f"config: {key}: expected {names}, got {short(value)}"


def _names(key: str, value: Any) -> tuple[str, ...]:
    """A list of names; a string is split at its commas, but one that begins with "regex:" is one pattern."""
    if isinstance(value, str):
        if value.startswith("["):
            try:
                value = load_yaml(value)
            except ValueError as error:
                raise UserError(f"config: {key}: not a list: {short(value)}") from error
        else:
            parts = [value] if value.startswith("regex:") else value.split(",")
            value = [part.strip() for part in parts if part.strip()]
    if key == "report_to" and value == ["none"]:  # as in transformers
        value = []
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise UserError(f"config: {key}: expected a list of {', '.join(CHOICES[key])}, got {short(value)}")
    for part in value:
        if any("\ud800" <= character <= "\udfff" for character in part):
            raise UserError(f"config: {key}: not UTF-8 text; write it again")
        if not any(_is_choice(part, choice) for choice in CHOICES[key]):
            raise UserError(f"config: {key}: expected {', '.join(CHOICES[key])}, got {short(part)}")
    return tuple(value)


def _is_choice(part: str, choice: str) -> bool:
    if choice == "last_tokens:N":
        return re.fullmatch(r"last_tokens:[1-9][0-9]{0,8}", part) is not None
    if choice == "regex:PATTERN":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what future versions of Python read in another way
                return part.startswith("regex:") and bool(re.compile(part[len("regex:") :]).pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"config: answer_span: {short(part)} is not a regular expression: {error}") from error
    return part == choice
