"""Truth in float64, and whether an implementation is right.

log-probs and entropy: largest absolute error in nats. Gradients: largest error over the largest entry of the truth.

Budget: twice the error of plain torch on the same inputs (the product in their dtype, softmax and log_softmax in
float32, p log p of p = 0 taken as 0), plus the rounding of the result to its own dtype, plus two float32 roundings at
the size of the largest logit (at 1 for a gradient, which is relative), plus, for a gradient that is a product, twice
the float32 rounding of a sum of K terms in any order, sqrt(K) 2^-24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Outcome = dict[str, Tensor]
"""What a work gives: "logprobs", "entropy" [N], and "dLogits" or "dHidden", "dWeight"."""

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
IN_NATS = ("logprobs", "entropy", "score", "advantages")


@dataclass(frozen=True)
class Verdict:
    errors: dict[str, float]
    budgets: dict[str, float]

    @property
    def wrong(self) -> list[str]:
        """The quantities over budget; a NaN is over it."""
        return [key for key, error in self.errors.items() if not error <= self.budgets[key]]


def plain(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) in the dtype of the logits, in torch: the truth when that is float64, else the yardstick."""
    tau = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).expand(len(targets))
    logp = torch.log_softmax(logits / tau[:, None], -1)
    # 0 * -inf is nothing here; the replaced zero keeps the NaN out of the gradient too.
    finite = torch.where(logp == -torch.inf, torch.zeros_like(logp), logp)
    return logp.gather(-1, targets[:, None])[:, 0], -(torch.softmax(logits / tau[:, None], -1) * finite).sum(-1)


def largest(x: Tensor) -> float:
    """max |x|; NaN if x holds one, 0 of nothing."""
    if x.numel() == 0:
        return 0.0
    value = x.abs().max()
    return math.nan if bool(torch.isnan(x).any()) else float(value)


def error(got: Tensor, exact: Tensor, key: str) -> float:
    """The error of one quantity; an infinity where the truth has the same one is none, any other NaN or inf is NaN."""
    got, exact = got.detach().double(), exact.detach().double()
    if got.shape != exact.shape:
        return math.nan
    same = got == exact  # infinities
    difference = torch.where(same, torch.zeros_like(got), got - exact)
    worst = largest(difference)
    if not math.isfinite(worst):
        return math.nan
    return worst if key in IN_NATS else worst / (largest(exact) or 1.0)


def judge(
    got: Outcome, exact: Outcome, yardstick: Outcome, terms: Mapping[str, int] | None = None, scale: float = 1.0
) -> Verdict:
    """Errors and budgets of all that `got` holds.

    `terms`: how many terms the sums of a product have, K. `scale`: the largest logit, over the temperature.
    """
    errors, budgets = {}, {}
    for key, value in got.items():
        errors[key] = error(value, exact[key], key)
        torchs = error(yardstick[key], exact[key], key)
        finite = exact[key][exact[key].isfinite()]
        size = (largest(finite) if key in IN_NATS else 1.0) or 1.0
        rounding = 2 * EPS[value.dtype] * size + 2.0**-22 * (max(size, scale, 1.0) if key in IN_NATS else 1.0)
        rounding += 2 * math.sqrt((terms or {}).get(key, 0)) * 2.0**-24
        budgets[key] = rounding + (2 * torchs if math.isfinite(torchs) else 0.0)
    return Verdict(errors, budgets)
