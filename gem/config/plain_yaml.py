"""YAML as a configuration needs it: plain values. Safe to read whatever is in it, and nothing stands there twice."""

from __future__ import annotations

from typing import Any

import yaml


class NotPlain(ValueError):
    """Not YAML, or YAML that is no plain value; the message has line and column where they are known."""


def load_yaml(text: str) -> Any:
    """The one document of a text; None where it is empty. `NotPlain` for all that cannot be read.

    Beside what `yaml.safe_load` refuses: a key that stands twice, whose first value it drops in silence, and aliases,
    with which a few lines of text become a value without end.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError as error:
        raise NotPlain("nested too deeply") from error
    except Exception as error:  # a YAMLError, or what its constructors stumble over: 2026-99-99, "!!int" alone
        words = " ".join(str(error).split())
        raise NotPlain(words if isinstance(error, yaml.YAMLError | ValueError) else f"no value: {words}") from error


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(None, None, "an alias (*) is not read: write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
            if isinstance(name, str | int | float | bool) and seen.setdefault(name, line) != line:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {str(name)[:100]!r} stands in line {seen[name]} too", key.start_mark
                )
        return super().construct_mapping(node, deep)
