"""In the place of another library's functions, in all of its modules, until it is undone."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from .. import arguments


class Ours:
    """In the place of a function, a method, or an autograd.Function's `apply`.

    `function` takes what the other's takes, and returns what that returns, or None where it does not compute it: then
    the other's own is called.
    """

    def __init__(self, own: Any, function: Callable[..., Any]):
        self.own, self.function = getattr(own, "apply", own), function
        self.__doc__, self.__name__ = own.__doc__, own.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        return self.own(*args, **kwargs) if result is None else result

    apply = __call__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)


class Swap:
    """The library's objects -> what stands in their place, in each of its modules that has them.

    `methods`: a method of a class and what stands in its place, as (class, name, Ours).
    """

    def __init__(self, library: str, pairs: dict[Any, Ours], methods: list[tuple[type, str, Ours]] | None = None):
        self.library, self.pairs, self.methods = library, pairs, methods or []
        self._exchange(pairs)
        for owner, name, ours in self.methods:
            setattr(owner, name, ours)

    def undo(self) -> None:
        self._exchange({ours: own for own, ours in self.pairs.items()})
        for owner, name, ours in self.methods:
            setattr(owner, name, ours.own)
        self.pairs, self.methods = {}, []

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _exchange(self, pairs: dict[Any, Any]) -> None:
        for name, module in list(sys.modules.items()) if pairs else ():
            if name.partition(".")[0] == self.library and isinstance(module, types.ModuleType):
                for key, value in list(vars(module).items()):
                    if callable(value) and not inspect.ismodule(value) and value.__hash__ and value in pairs:
                        setattr(module, key, pairs[value])


def check_parameters(library: str, written_for: str, version: str, name: str, function: Any, parameters: str) -> None:
    """Raises where `function`, the library's `name`, is missing (None) or takes other parameters than those."""
    if function is None or " ".join(inspect.signature(function).parameters) != parameters:
        expected = f"of version {written_for}, whose {name} takes ({parameters.replace(' ', ', ')})"
        got = "without it" if function is None else f"whose one takes {inspect.signature(function)}"
        arguments.fail(library, expected, f"{version}, {got}")


def version_of(package: str) -> str:
    """Of the installed distribution; a checkout on the path has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "one of no known version"


def loaded(library: str, written_for: str, *modules: str) -> list[types.ModuleType]:
    """The modules of a library that must be installed."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as error:
        name = str(error.name)
        got = f"no module {name}" if name.partition(".")[0] == library else f"one that does not find its {name}"
        arguments.fail(library, f"installed, in version {written_for}", got)


def computed_here(x: torch.Tensor) -> bool:
    """Whether this package's functions take the tensor as it is."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return plain and x.device.type in ("cpu", "cuda") and x.dtype in arguments.LOGIT_DTYPES
