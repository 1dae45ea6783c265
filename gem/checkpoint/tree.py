"""Dataclasses as what `torch.load(weights_only=True)` reads back, and back again."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


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
