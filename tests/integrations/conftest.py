"""What the tests of trainers that are not installed share: a place for stand-ins, and small inputs."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.integrations.tiny import D, V


@pytest.fixture(autouse=True)
def accelerate_as_before():
    """A trainer's mixed precision stays in accelerate's state of the process, where `gem train` would find it."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in("a.b", name=object) puts modules of these names, and those above them, in sys.modules."""

    def put(name, **objects):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            full = ".".join(parts[:i])
            if full not in sys.modules:
                module = types.ModuleType(full)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, full, module)
        for key, value in objects.items():
            setattr(sys.modules[name], key, value)
        return sys.modules[name]

    return put


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (2, 5), generator=generator)
    return SimpleNamespace(hidden=hidden, weight=weight, targets=targets, logits=hidden @ weight.t())
