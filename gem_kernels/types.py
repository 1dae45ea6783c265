"""The result types of gem_kernels, VocabParallel, and the letters its shapes are written in.

    N  token rows          V  vocabulary         D  hidden size
    P  prompts             G  candidates of one prompt
    B  = P * G sequences   T  padded completion length

Every floating-point output is float32, whatever the input. Entropies and log-probabilities are in nats.
The types are pytrees, so they pass through torch.compile, torch.utils._pytree and functorch transforms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = -1.0e30
"""A logit at or below it is a masked word and counts as -inf, in every backend."""


@dataclass(frozen=True)
class TokenStats:
    """Statistics of each token row, shaped like `targets`."""

    logprobs: Tensor
    """log p(target), nats. 0 where the target is ignored."""
    entropy: Tensor
    """H = -sum_v p_v log p_v, nats. 0 where the target is ignored."""


@dataclass(frozen=True)
class EntropyScores:
    """The entropy score of each sequence; all [B]. An invalid sequence has zeros and `valid` False."""

    score: Tensor
    """S = -final_entropy + fork_weight * fork_entropy."""
    final_entropy: Tensor
    """Mean entropy over the answer span, nats."""
    fork_entropy: Tensor
    """Mean of the m largest entropies of the reasoning span, nats; 0 when that span is empty."""
    valid: Tensor
    """Boolean: the sequence takes part in its group."""


@dataclass(frozen=True)
class EntropyScoreOutput:
    """`EntropyScores`, the group advantages [B], and the token statistics they came from (shaped like `targets`)."""

    score: Tensor
    final_entropy: Tensor
    fork_entropy: Tensor
    valid: Tensor
    advantages: Tensor
    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class SegaOutput:
    """The SEGA loss (a scalar that backward starts from) and, detached, all that it was made of."""

    loss: Tensor
    score: Tensor
    final_entropy: Tensor
    fork_entropy: Tensor
    valid: Tensor
    advantages: Tensor
    logprobs: Tensor
    entropy: Tensor
    path: str = "logits"
    """How the gradients were made: "logits", "one_shot" (3 G) or "two_phase" (3 to 4 G); G = 2 N D V flop."""
    active_share: Tensor | None = None
    """With `active_vocab`: the share of the vocabulary's columns that was kept, averaged over rows."""
    active_error: Tensor | None = None
    """With `active_vocab`: relative L2 error of the gradient of `hidden`, measured. None where it is not needed."""
    active_weight_error: Tensor | None = None
    """The same of `weight`."""


@dataclass(frozen=True)
class PolicyLossOutput:
    """A loss of log-probs and entropies (a scalar that backward starts from) and both, detached."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    active_share: Tensor | None = None
    """These three as in SegaOutput."""
    active_error: Tensor | None = None
    active_weight_error: Tensor | None = None


@dataclass(frozen=True)
class VocabParallel:
    """A vocabulary in shards: the ranks of `process_group`, in order, hold the rows of the head's weight (and bias).

    For the `vocab_parallel` of the linear functions. Shards may differ in size. Hidden states and targets (ids of the
    whole vocabulary), like every other argument, are the same on all ranks, and all ranks make the same calls in the
    same order, backward included. Results are the same on all ranks, to the bit. The gradient of `hidden` is that of
    the whole vocabulary, on every rank; those of weight and bias are this shard's.

    A call with gradients costs one all_gather of 4 numbers a row, and one all_reduce of the gradient of `hidden` a
    chunk.

    Example:
        >>> parallel = VocabParallel(torch.distributed.group.WORLD)
        >>> out = linear_token_stats(hidden, my_rows_of_the_weight, targets, vocab_parallel=parallel)
    """

    process_group: torch.distributed.ProcessGroup
    """This rank is in it. A group of one: no shards."""
    vocab_starts: Sequence[int] | None = None
    """The first word of each rank's shard and, last, V: k + 1 integers. Without it the ranks exchange their sizes and
    compare their arguments at the start of each call (on a GPU that waits for the device)."""


for _type in (TokenStats, EntropyScores, EntropyScoreOutput, SegaOutput, PolicyLossOutput):
    torch.utils._pytree.register_dataclass(_type, field_names=[f.name for f in dataclasses.fields(_type)])
