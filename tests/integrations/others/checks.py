"""A trainer's function and this package's, on the same inputs, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

V, D = 301, 64


def versions(*names: str) -> None:
    print(
        ", ".join(f"{name} {version(name)}" for name in ("torch", *names))
        + "; errors against float64 (the trainer's own)"
    )


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.double().log_softmax(-1)
    return logp.gather(-1, targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [*shape, D], weight [V, D], targets [*shape]; logits of a deviation of 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).mul(3 / D**0.5).to(dtype)
    return hidden, weight, torch.randint(0, V, shape, generator=generator)


def run(function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], entropy_weight: float | None = 0.3):
    """function(*leaves) -> (log-probs, entropies): both, and the gradients of a loss of both; None: of the first."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    logprobs, entropy = function(*leaves)
    upstream = torch.linspace(-1, 1, logprobs.numel(), dtype=torch.float64).view(logprobs.shape)
    loss = (logprobs.double() * upstream).sum()
    if entropy_weight is not None:
        loss = loss + entropy_weight * entropy.double().sum()
    return [x.detach() for x in (logprobs, entropy)] + list(torch.autograd.grad(loss, leaves))


def compare(what: str, ours: Sequence[Tensor], own: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Relative L2 errors against float64: at most twice the trainer's own, plus rounding of float32.

    Of several gradients, the one furthest off is shown.
    """
    names = ["log-probs", "entropies", *["gradient"] * (len(ours) - 2)]
    shown: dict[str, tuple[float, float]] = {}
    for name, x, y, z in zip(names, ours, own, truth, strict=True):
        size = float(z.double().norm())
        error, limit = (float((v.double() - z.double()).norm()) / size for v in (x, y))
        assert x.shape == y.shape == z.shape, (what, name, x.shape, y.shape)
        assert error <= 2 * limit + 2.0**-20, (what, name, error, limit)
        shown[name] = max(shown.get(name, (0.0, 0.0)), (error, limit))
    text = ", ".join(f"{name} {error:.1e} ({limit:.1e})" for name, (error, limit) in shown.items())
    print(f"  {what}: {text}")
