"""Group advantages where a tensor of ids says who belongs together: plain torch, on every device.

Groups may stand in any order and have any sizes. Nothing waits for the device: an id becomes a number below B by
sorting, and all sums over groups are scatters into B places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_id(scores: Tensor, ids: Tensor, valid: Tensor | None, mapping: str, scale: str, eps: float) -> Tensor:
    """[B] float32, [B] integers -> advantages [B] float32; see `gem_kernels.group_advantages`."""
    if scores.shape[0] == 0:
        return torch.empty_like(scores)
    member = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    group = _numbered(ids)
    zeros = torch.zeros(scores.shape[0], dtype=torch.float64, device=scores.device)

    # float64: the order in which a GPU adds is then not seen in the float32 that comes out.
    def total(values: Tensor) -> Tensor:
        return zeros.index_add(0, group, torch.where(member, values.double(), 0.0))[group]

    def largest(values: Tensor) -> Tensor:
        values = torch.where(member, values.double(), -torch.inf)
        return (zeros - torch.inf).scatter_reduce(0, group, values, "amax")[group]

    n = total(torch.ones_like(zeros))
    r = _mapped(scores.double(), group, member, n, mapping, total, largest)
    # Less the largest, so that equal members are exact zeros before the mean is taken.
    r = torch.where(member, r - largest(r), 0.0)
    a = torch.where(member, r - total(r) / n.clamp(min=1), 0.0)
    if scale == "group":
        a = torch.where(a == 0, 0.0, a / ((total(a * a) / (n - 1).clamp(min=1)).sqrt() + eps))
    return torch.where(member & (n > 1), a, 0.0).float()


def _numbered(ids: Tensor) -> Tensor:
    """Any integers -> integers in [0, B), equal where they are equal."""
    ordered, order = ids.long().sort(stable=True)
    number = _starts(ordered).long().cumsum(0) - 1
    return torch.empty_like(number).scatter_(0, order, number)


def _starts(*ordered: Tensor) -> Tensor:
    """Where a run of equal entries (in all of the tensors) begins."""
    change = torch.ones_like(ordered[0], dtype=torch.bool)
    change[1:] = torch.stack([x[1:] != x[:-1] for x in ordered]).any(0)
    return change


def _mapped(
    s: Tensor, group: Tensor, member: Tensor, n: Tensor, mapping: str, total: Callable[..., Any], largest: Any
) -> Tensor:
    if mapping == "identity":
        return s
    if mapping == "softmax":
        e = torch.where(member, (s - largest(s)).exp(), 0.0)
        return torch.where(n > 0, e / total(e), 0.0)
    # Ranks: members sorted by group, then by score; the others stand behind all of them. NaN beats nobody.
    by_score = s.argsort(stable=True)
    behind = torch.where(member, group, s.shape[0])
    order = by_score[behind[by_score].argsort(stable=True)]
    group_of, score_of = behind[order], s[order]
    at = torch.arange(s.shape[0], dtype=torch.int64, device=s.device)
    equal = _starts(group_of, score_of)
    first = torch.where(equal, at, 0).cummax(0).values
    first_of_group = torch.where(_starts(group_of), at, 0).cummax(0).values
    run = equal.long().cumsum(0) - 1
    ties = torch.zeros_like(s).index_add(0, run, torch.ones_like(s))[run]
    beats = torch.where(score_of.isnan(), 0.0, (first - first_of_group) + 0.5 * ties)
    beats = torch.empty_like(s).scatter_(0, order, beats)
    return (beats - 0.5) / (n - 1).clamp(min=1)
