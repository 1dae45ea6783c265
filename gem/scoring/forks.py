"""Which tokens a score is made of: the answer, the reasoning before it, and the fork tokens among those."""

from __future__ import annotations

import torch
from torch import Tensor

from gem_kernels import num_fork_tokens

# A fork token repeats where the last so many tokens, itself included, stood in the completion before.
NGRAM = 4


def answer_and_reasoning(completion_mask: Tensor, answer_start: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the answer span and those before it, [B, T] bool each; the last fifth where there is no answer."""
    length = completion_mask.sum(1)
    start = torch.where((answer_start >= 0) & (answer_start < length), answer_start, 4 * length // 5)
    before = torch.arange(completion_mask.shape[1], device=completion_mask.device) < start[:, None]
    return completion_mask & ~before, completion_mask & before


def fork_tokens(entropy: Tensor, completion_mask: Tensor, answer_start: Tensor, top_m: float | int) -> Tensor:
    """The m tokens of the largest entropy before the answer, those that H_fork is made of: [B, T] bool.

    Of equal entropies the earlier counts.
    """
    _, reasoning = answer_and_reasoning(completion_mask, answer_start)
    num = num_fork_tokens(reasoning.sum(1), top_m)
    order = entropy.masked_fill(~reasoning, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return rank < num[:, None]


def repeated_tokens(completion_ids: Tensor, completion_mask: Tensor, ngram: int = NGRAM) -> Tensor:
    """Tokens that end an n-gram which ended at an earlier token of the same completion too: [B, T] bool."""
    repeats = torch.zeros_like(completion_mask)
    for row, (ids, length) in enumerate(zip(completion_ids.tolist(), completion_mask.sum(1).tolist())):
        seen: set[tuple[int, ...]] = set()
        for end in range(ngram, length + 1):
            gram = tuple(ids[end - ngram : end])
            repeats[row, end - 1] = gram in seen
            seen.add(gram)
    return repeats
