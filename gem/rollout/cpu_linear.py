"""Products of a weight with few rows on a CPU, as sampling makes them: one token of each candidate at a time.

In float32 MKL takes (weight @ x.T).T in a third to three quarters of the time of x @ weight.T for 2 to 6 rows, and in
less for most numbers up to 64; the numbers are the same to rounding. docs/decisions-training.md has the measurement.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ROWS = 64


@contextlib.contextmanager
def few_row_products(model: nn.Module) -> Iterator[None]:
    """Within, the model's plain linear layers on a CPU multiply few rows the quicker way. Without gradient."""
    changed = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    changed = [m for m in changed if "forward" not in vars(m)]  # another library's
    for module in changed:
        module.forward = functools.partial(_linear, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    weight = module.weight
    plain = type(weight) is nn.Parameter and x.dtype == weight.dtype == torch.float32
    rows = x.numel() // max(1, x.shape[-1])
    if torch.is_grad_enabled() or not plain or not 2 <= rows <= MOST_ROWS:
        return F.linear(x, weight, module.bias)
    return _product(x.reshape(rows, -1), weight, module.bias).view(*x.shape[:-1], -1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, D], weight [V, D] -> [R, V]."""
    product = torch.mm(weight, x.t()).t().contiguous()
    return product if bias is None else product.add_(bias)
