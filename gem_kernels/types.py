"""The result types of gem_kernels, and the letters its shapes are written in.

    N  token rows          V  vocabulary         D  hidden size
    P  prompts             G  candidates of one prompt
    B  = P * G sequences   T  padded completion length

Every floating-point output is float32, whatever the input. Entropies and log-probabilities are in nats.
The types are pytrees, so they pass through torch.compile, torch.utils._pytree and functorch transforms.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

NO_TARGET = -(2**62)
"""A target for the row kernels alone: the row has statistics and a gradient, but its target is in none of its words.
Log-prob NaN, gradient without the term of its target. A shard of a vocabulary sees most targets so.
"""


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


for _type in (TokenStats, EntropyScores, EntropyScoreOutput, SegaOutput, PolicyLossOutput):
    torch.utils._pytree.register_dataclass(_type, field_names=[f.name for f in dataclasses.fields(_type)])
