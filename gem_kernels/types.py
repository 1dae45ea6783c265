"""The result types of gem_kernels, VocabParallel, and the letters its shapes are written in.

    N  token rows          V  vocabulary         D  hidden size
    P  prompts             G  candidates of one prompt
    B  = P * G sequences   T  padded completion length

Every floating-point output is float32, whatever the input. Entropies and log-probabilities are in nats.
The types are pytrees, so they pass through torch.compile, torch.utils._pytree and torch.func. The functions of logits
run in torch.func.grad; those of hidden states raise an error there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOAT32_MAX = 3.4028234663852886e38
FLOOR = -1.0e30
"""A logit at or below it is a masked word and counts as -inf, in every backend."""


@dataclass(frozen=True)
class TokenStats:
    """Statistics of each token row, shaped like `targets`."""

    logprobs: Tensor
    """log p(target), nats. 0 where the target is ignored."""
    entropy: Tensor
    """H = -sum_v p_v log p_v, nats. 0 where the target is ignored."""


FEATURES = (
    "final_entropy", "fork_entropy", "reasoning_entropy", "mean_entropy", "max_entropy",
    "mean_logprob", "sum_logprob", "min_logprob", "length",
)  # fmt: skip
"""The features of a completion, in the order the operators hold them."""


@dataclass(frozen=True)
class CompletionFeatures:
    """What the tokens of each completion say of it; all [B] float32. An invalid completion has zeros."""

    final_entropy: Tensor
    """Mean entropy of the answer span, nats."""
    fork_entropy: Tensor
    """Mean of the m largest entropies of the reasoning span, nats; 0 when that span is empty."""
    reasoning_entropy: Tensor
    """Mean entropy of the reasoning span, nats; 0 when that span is empty."""
    mean_entropy: Tensor
    """Mean entropy of all counted tokens, nats."""
    max_entropy: Tensor
    """Largest entropy of a counted token, nats."""
    mean_logprob: Tensor
    """Mean log-prob of the counted tokens, nats."""
    sum_logprob: Tensor
    """Log-prob of the whole completion, nats."""
    min_logprob: Tensor
    """Smallest log-prob of a counted token, nats."""
    length: Tensor
    """Counted tokens."""
    valid: Tensor
    """Boolean, as in `EntropyScores`."""

    def score(self, linear: LinearScore) -> Tensor:
        """sum_f weights[f] * x_f / scales[f], [B] float32; 0 for an invalid completion."""
        total = torch.zeros_like(self.length)
        for name, coefficient in zip(FEATURES, linear.coefficients):
            if coefficient:
                total = total + coefficient * getattr(self, name)
        return torch.where(self.valid, total, 0.0)


@dataclass(frozen=True)
class LinearScore:
    """A score that is linear in named features of a completion (`FEATURES`):

        S = sum_f weights[f] * x_f / scales[f]

    Features without a weight are left out, whatever they hold. The paper's score is
    LinearScore({"final_entropy": -1.0, "fork_entropy": fork_weight}).

    Args:
        weights: by feature name, at least one; finite. Higher scores are better.
        scales: by feature name, finite and above 0; 1 where not given.

    Raises:
        ValueError: a name is unknown, or a number is not as above.

    Example:
        >>> calibrated = LinearScore({"final_entropy": -0.2, "mean_logprob": 1.4}, {"mean_logprob": 0.08})
        >>> out = fused_entropy_score(logits, ids, completion_mask=mask, answer_start=start, group_size=8,
        ...                           score=calibrated)
    """

    weights: Mapping[str, float]
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("weights", self.weights), ("scales", self.scales)):
            if not isinstance(values, Mapping):
                raise ValueError(f"`{name}` must be a mapping from feature names to numbers, got {values!r}")
            for feature, value in values.items():
                if feature not in FEATURES:
                    raise ValueError(f"`{name}` must name features among {', '.join(FEATURES)}, got {feature!r}")
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not abs(value) <= FLOAT32_MAX or (name == "scales" and value <= 0):
                    wanted = "finite numbers" + (" above 0" if name == "scales" else "")
                    raise ValueError(f"`{name}` must hold {wanted}, got {feature}: {value!r}")
        if not self.weights:
            raise ValueError("`weights` must name a feature, got none")
        if not all(abs(value) <= FLOAT32_MAX for value in self.coefficients):
            raise ValueError(f"`weights` over `scales` must fit float32, got {self.coefficients!r}")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """weights[f] / scales[f], one for each of `FEATURES`; 0 for those without a weight."""
        return tuple(self.coefficient(name) for name in FEATURES)

    def coefficient(self, feature: str) -> float:
        """weights[feature] / scales[feature]; 0 where it has no weight."""
        return float(self.weights.get(feature, 0.0)) / float(self.scales.get(feature, 1.0))


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
    """How the gradients were made: "logits", "one_shot" (3 products with the head, 2 where it is frozen) or "two_phase"
    (3 to 4); under torch.compile "compiled": which of the last two is found at run time. A product is 2 N D V flop."""
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

    For the `vocab_parallel` of the functions of hidden states, and of those of logits, where each rank has the columns
    of its words. Shards may differ in size. Hidden states and targets (ids of the whole vocabulary), like every other
    argument, are the same on all ranks, and all ranks make the same calls in the same order, backward included. Results
    are the same on all ranks, to the bit. The gradient of `hidden` is that of the whole vocabulary, on every rank (but
    see `reduce_hidden_grad`); those of weight, bias and logits are this shard's.

    A call costs one all_gather of 4 numbers a row (one a chunk where the gradients are made in one shot), and, with a
    gradient of `hidden`, one all_reduce of that a chunk. Logits need nothing in backward.

    Example:
        >>> parallel = VocabParallel(torch.distributed.group.WORLD)
        >>> out = linear_token_stats(hidden, my_rows_of_the_weight, targets, vocab_parallel=parallel)
    """

    process_group: torch.distributed.ProcessGroup
    """This rank is in it. A group of one: no shards."""
    vocab_starts: Sequence[int] | None = None
    """The first word of each rank's shard and, last, V: k + 1 integers. Without it the ranks exchange their sizes and
    compare their arguments at the start of each call (on a GPU that waits for the device)."""
    reduce_hidden_grad: bool = True
    """False: the gradient of `hidden` is this shard's part, and no all_reduce is made. For where the caller's own
    backward adds the parts up: under sequence parallelism, the backward of the all_gather that made `hidden` is a
    reduce_scatter. Of parts that are sums already it would make the gradient as many times too large as there are
    ranks. Weight and bias are not touched by this."""


for _type in (TokenStats, CompletionFeatures, EntropyScores, EntropyScoreOutput, SegaOutput, PolicyLossOutput):
    torch.utils._pytree.register_dataclass(_type, field_names=[f.name for f in dataclasses.fields(_type)])
