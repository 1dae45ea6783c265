"""prime-rl: its two fused heads alone, from a clone that the variable PRIME_RL names.

    git clone https://github.com/PrimeIntellect-ai/prime-rl
    PRIME_RL=prime-rl python -m tests.integrations.others prime_rl

prime-rl is not on PyPI and asks for a GPU's libraries, so lm_head.py and lm_head_gemma.py are loaded without what is
around them: its logger and its reader of softcaps are empty stand-ins, which the heads' forward does not call.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch

from gem_kernels.integrations import prime_rl as integration
from tests.integrations.others.checks import D, V, compare, exact, inputs, run, versions


def heads() -> list[types.ModuleType]:
    if "PRIME_RL" not in os.environ:
        sys.exit("PRIME_RL is not set: it names a clone of prime-rl")
    folder = Path(os.environ["PRIME_RL"]) / "src" / Path(*integration.LAYERS.split("."))
    parts = integration.LAYERS.split(".")
    for i in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:i]))
        package.__path__ = []
        sys.modules[package.__name__] = package
    for name in ("prime_rl.utils", "prime_rl.utils.logger", "prime_rl.utils.vlm"):
        sys.modules[name] = MagicMock()
    found = []
    for name in ("lm_head", "lm_head_gemma"):
        spec = importlib.util.spec_from_file_location(f"{integration.LAYERS}.{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found.append(module)
    return found


def one_head(what: str, module: torch.nn.Module, dtype: torch.dtype, softcap: float | None) -> None:
    """With a temperature of each token's own; through the entropy too, where prime-rl does not refuse that."""
    hidden, weight, targets = inputs(dtype, 2, 37)
    temperature = torch.linspace(0.6, 1.4, 74).view(2, 37)

    def call(h, w):
        module.weight = None  # a parameter; what follows is the leaf of the gradient
        module.__dict__["weight"] = w
        found = module(h, targets, temperature)
        return found["logprobs"], found["entropy"]

    def reference(h, w):
        z = h @ w.t()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return exact(z / temperature[..., None], targets)

    leaves, wide = [hidden, weight], [hidden.double(), weight.double()]
    with integration.use_gem_kernels():
        ours, ours_of_both = (run(call, leaves, entropy_weight=w) for w in (None, 0.3))
    own = run(call, leaves, entropy_weight=None)
    compare(f"{what}, {dtype}", ours, own, run(reference, wide, entropy_weight=None))
    truth = run(reference, wide)
    try:
        compare(f"{what}, {dtype}, through the entropy too", ours_of_both, run(call, leaves), truth)
    except AssertionError as error:
        if "entropy is not implemented" not in str(error):
            raise
        eager = run(lambda h, w: [x.float() for x in reference(h, w)], leaves)
        compare(f"{what}, {dtype}, through the entropy (refused; eager torch)", ours_of_both, eager, truth)


def a_nucleus(module: torch.nn.Module) -> None:
    """A sampling mask goes to prime-rl's own."""
    hidden, _, targets = inputs(torch.float32, 2, 5)
    mask = torch.stack([targets, (targets + 1) % V], -1).int()
    given = (hidden, targets, torch.ones(2, 5), mask)
    own = module(*given)["logprobs"]
    with integration.use_gem_kernels():
        assert torch.equal(module(*given)["logprobs"], own)
    print("  a sampling mask: prime-rl's own")


if __name__ == "__main__":
    versions()
    plain, gemma = heads()
    for _dtype in (torch.float32, torch.bfloat16):
        one_head("FusedOutputLinear", plain.FusedOutputLinear(D, V, 16), _dtype, None)
        one_head("GemmaFusedOutputLinear", gemma.GemmaFusedOutputLinear(D, V, 16, 5.0), _dtype, 5.0)
    a_nucleus(plain.FusedOutputLinear(D, V, 16))
    print("prime_rl: all as expected")
