"""Entropies -> the score of each sequence -> group advantages; and both straight from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from . import arguments
from .backends import groups
from .backends.cpu import span_scores as cpu
from .backends.types import Completions, ScoreRule
from .logit_stats import token_stats
from .types import (
    FEATURES,
    CompletionFeatures,
    EntropyScoreOutput,
    EntropyScores,
    LinearScore,
    TokenStats,
    VocabParallel,
)

MAPPINGS = ("identity", "softmax", "rank")
SCALES = ("none", "group")
NO_ANSWER = ("tail", "exclude")


@torch.library.custom_op("gem_kernels::span_scores", mutates_args=())
def span_scores_op(
    entropy: Tensor,
    logprobs: Optional[Tensor],  # noqa: UP045
    completion_mask: Optional[Tensor],  # noqa: UP045
    cu_seqlens: Optional[Tensor],  # noqa: UP045
    answer_start: Tensor,
    valid: Optional[Tensor],  # noqa: UP045
    weights: list[float],
    top_share: float,
    top_count: int,
    exclude: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T] or [N] float32 -> features [9, B] float32 in the order of FEATURES, score [B] float32, valid [B] bool.

    score = sum of weight * feature; without `logprobs` their features are 0. `top_m` is top_count, or where that is 0
    top_share.
    """
    if cu_seqlens is not None:
        arguments.check_offsets(cu_seqlens, entropy.shape[0])
    logprobs = None if logprobs is None else logprobs.contiguous()
    given = Completions(entropy.contiguous(), logprobs, completion_mask, cu_seqlens, answer_start, valid)
    rule = ScoreRule(weights, *arguments.top_fraction(top_count or top_share), exclude)
    if backend != "triton":
        return cpu.span_scores(given, rule, compiled=backend == "cpu")

    from .backends.triton import launch

    return launch.span_scores(given, rule)


@span_scores_op.register_fake
def _(entropy, logprobs, completion_mask, cu_seqlens, answer_start, *args):
    features = torch.empty(len(FEATURES), answer_start.shape[0], dtype=torch.float32, device=entropy.device)
    return features, torch.empty_like(features[0]), torch.empty_like(features[0], dtype=torch.bool)


def completion_features(
    entropy: Tensor,
    logprobs: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor,
    top_m: float | int = 0.1,
    no_answer: str = "tail",
    valid: Tensor | None = None,
    backend: str = "auto",
) -> CompletionFeatures:
    """Nine numbers that the tokens of a completion say of it, for a linear score of one's own (`LinearScore`).

        final, fork, reasoning, mean, max entropy;   mean, sum, min log-prob;   length

    Final and fork are those of `entropy_scores`; reasoning is the mean over the reasoning span; the others are over
    all counted tokens.

    Args:
        entropy, logprobs: [B, T] with `completion_mask`, or [N] with `cu_seqlens`; nats, any floating dtype, as
            `token_stats` gives them.
        The rest: as for `entropy_scores`.

    Returns:
        CompletionFeatures, each [B] float32, constants of the gradient. Invalid completions have zeros. A log-prob of
        -inf makes -inf of mean, sum and min; a NaN makes NaN of what is made from it, in its own completion only.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> x = completion_features(stats.entropy, stats.logprobs, completion_mask=mask, answer_start=start)
        >>> x.score(LinearScore({"final_entropy": -1.0, "mean_logprob": 2.0}))
    """
    arguments.check_floating("logprobs", logprobs)
    completion_mask, valid = _masks(completion_mask, valid)
    spans = Spans(completion_mask, cu_seqlens, answer_start, top_m, no_answer, valid, backend)
    features, _, ok = _features_and_score(entropy, logprobs, spans, [0.0] * len(FEATURES))
    return CompletionFeatures(**dict(zip(FEATURES, features.unbind(0))), valid=ok)


def _masks(completion_mask: Any, valid: Any) -> tuple[Any, Any]:
    return arguments.as_mask("completion_mask", completion_mask), arguments.as_mask("valid", valid)


@dataclass(frozen=True)
class Spans:
    """Where the completions and their answers are: arguments of the public functions, as they were given."""

    completion_mask: Any
    """Tensor or None: one of this and `cu_seqlens` is given."""
    cu_seqlens: Any
    answer_start: Tensor
    top_m: float | int = 0.1
    no_answer: str = "tail"
    valid: Tensor | None = None
    backend: str = "auto"


def _features_and_score(
    entropy: Tensor, logprobs: Tensor | None, spans: Spans, weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, with its arguments checked."""
    arguments.check_floating("entropy", entropy)
    device = entropy.device
    B = arguments.check_layout(entropy, "entropy", spans.completion_mask, spans.cu_seqlens)
    integers = (torch.int64, torch.int32)
    arguments.check_tensor("answer_start", spans.answer_start, shape=(B,), dtypes=integers, device=device)
    if logprobs is not None:
        arguments.check_tensor("logprobs", logprobs, shape=entropy.shape, device=device)
    if spans.valid is not None:
        arguments.check_tensor("valid", spans.valid, shape=(B,), dtypes=(torch.bool,), device=device)
    arguments.check_top_m(spans.top_m)
    share, count = (spans.top_m, 0) if isinstance(spans.top_m, float) else (1.0, spans.top_m)
    arguments.check_choice("no_answer", spans.no_answer, NO_ANSWER)
    return span_scores_op(
        entropy.detach().float(),
        None if logprobs is None else logprobs.detach().float(),
        spans.completion_mask,
        spans.cu_seqlens,
        spans.answer_start,
        spans.valid,
        list(weights),
        share,
        count,
        spans.no_answer == "exclude",
        arguments.check_backend(spans.backend, device),
    )


def completion_scores(
    entropy: Tensor, logprobs: Tensor, spans: Spans, fork_weight: float, score: LinearScore | None = None
) -> EntropyScores:
    """The paper's score, or where `score` is given that one, from both statistics. Checks all of its arguments."""
    weights = score_weights(score, fork_weight)
    features, values, ok = _features_and_score(entropy, None if score is None else logprobs, spans, weights)
    if score is None and torch.compiler.is_compiling():
        fork = torch.where(features[1] * 0.0 + fork_weight == 0.0, 0.0, features[1] * fork_weight)
        values = torch.where(ok, fork - features[0], 0.0)
    return EntropyScores(values, features[0], features[1], ok)


def score_weights(score: LinearScore | None, fork_weight: float) -> tuple[float, ...]:
    """The weight of each of FEATURES, checked."""
    arguments.check_number("fork_weight", fork_weight)
    if score is None:
        # Of a number that the operator took torch.compile would compile every value: `completion_scores` adds it up.
        weight = 0.0 if torch.compiler.is_compiling() else float(fork_weight)
        return (-1.0, weight, *[0.0] * (len(FEATURES) - 2))
    if not isinstance(score, LinearScore):
        arguments.fail("score", "a LinearScore, or None for the paper's score", type(score).__name__)
    if fork_weight != 1.0:
        arguments.fail("fork_weight", "left out where `score` is given (it has a weight of its own)", fork_weight)
    return score.coefficients


def num_fork_tokens(num_reasoning: Tensor, top_m: float | int = 0.1) -> Tensor:
    """m of `entropy_scores`: how many of n reasoning tokens the fork entropy is made of.

        m = min(n, max(1, floor(top_m * n)))  of a share,      min(n, top_m)  of a count,      0 where n is 0

    Args:
        num_reasoning: n, int64 or int32, any shape; at most 2^31.
        top_m: a float in (0, 1] is a share: the fraction nearest to the decimal it is written as, with a denominator
            up to 10^9, so that 0.29 of 100 is 29 and 1/3 of 6 is 2. An int is a count.

    Returns:
        m, int64, shaped like `num_reasoning`.

    Raises:
        ValueError: an argument is not as above.

    Example:
        >>> num_fork_tokens(torch.tensor([0, 5, 100]), 0.29)
        tensor([ 0,  1, 29])
    """
    arguments.check_tensor("num_reasoning", num_reasoning, dtypes=(torch.int64, torch.int32))
    numerator, denominator = arguments.top_fraction(top_m)
    n = num_reasoning.long()
    m = n * numerator // denominator if denominator else torch.full_like(n, numerator)
    return torch.minimum(m.clamp(min=1), n)


def entropy_scores(
    entropy: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor,
    fork_weight: float = 1.0,
    top_m: float | int = 0.1,
    no_answer: str = "tail",
    valid: Tensor | None = None,
    backend: str = "auto",
) -> EntropyScores:
    """The entropy score of each completion: sure of its answer, exploring in its reasoning.

        final_entropy = mean of H over the answer span
        fork_entropy  = mean of the m largest H in the reasoning span,   m = max(1, floor(top_m * n)) or a count
        score         = -final_entropy + fork_weight * fork_entropy                                        (nats)

    The answer span runs from `answer_start` to the end, the reasoning span is all before it; n counts its tokens. The
    top m are exact, ties included. An empty reasoning span has fork_entropy 0.

    Args:
        entropy: [B, T] with `completion_mask`, or [N] with `cu_seqlens`; nats, any floating dtype.
        completion_mask: [B, T] bool, or integers 0 and 1; True counts. A completion reaches from its first True to its
            last; leading False (a prompt) and holes (a tool's output) are allowed and never counted.
        cu_seqlens: [B + 1] int32, offsets of packed completions: 0, ..., N.
        answer_start: [B] integers, the answer's offset from the completion's first token. Negative, or not below the
            completion's length, means that no answer was found.
        fork_weight: lambda.
        top_m: a float in (0, 1] is a share, an int a count; `num_fork_tokens` says which m they give.
        no_answer: "tail": the answer is then the last fifth, from 4 * length // 5 on; "exclude": it is invalid.
        valid: [B] bool, or integers 0 and 1; False leaves a sequence out (a truncated one, say).
        backend: as for `token_stats`. "torch" and the CPU go through the sequences one by one.

    Returns:
        EntropyScores(score, final_entropy, fork_entropy, valid), each [B]. Empty completions, and answer spans without
        a counted token, are invalid; an invalid sequence has zeros. The score is a constant of the gradient: `entropy`
        is detached.

    Raises:
        ValueError: an argument is not as above. `cu_seqlens` is looked at on the CPU; on a GPU it is clamped to [0, N].

    Source: GEM (arXiv 2511.13007), Eq. 1.
    """
    completion_mask, valid = _masks(completion_mask, valid)
    spans = Spans(completion_mask, cu_seqlens, answer_start, top_m, no_answer, valid, backend)
    return completion_scores(entropy, entropy, spans, fork_weight)


@torch.library.custom_op("gem_kernels::group_advantages", mutates_args=())
def group_advantages_op(
    scores: Tensor,
    group_size: int,
    valid: Optional[Tensor],  # noqa: UP045
    mapping: str,
    scale: str,
    eps: float,
    backend: str,
) -> Tensor:
    if backend != "triton":
        return cpu.group_advantages(scores, group_size, valid, mapping, scale, eps)

    from .backends.triton import launch

    return launch.group_advantages(scores, group_size, valid, MAPPINGS.index(mapping), scale == "group", eps)


@group_advantages_op.register_fake
def _(scores, *args):
    return torch.empty_like(scores)


def group_advantages(
    scores: Tensor,
    group_size: int | None = None,
    *,
    valid: Tensor | None = None,
    mapping: str = "identity",
    scale: str = "none",
    eps: float = 1e-4,
    backend: str = "auto",
    group_ids: Tensor | None = None,
) -> Tensor:
    """A_i = f(S_i) - mean of f(S) over the valid members of i's group; optionally / (their standard deviation + eps).

    Args:
        scores: [B], any floating dtype.
        group_size: G, a divisor of B: groups are runs of `group_size`.
        group_ids: [B] integers, in place of `group_size`: equal ids are one group, in any order and of any size. These
            are grouped in plain torch, whatever `backend` is.
        valid: [B] bool, or integers 0 and 1; invalid members get 0 and are left out of mean and deviation.
        mapping: f. "identity" (the paper); "softmax" over the group; "rank": the share of the other valid members that
            i beats, ties counting half, in [0, 1].
        scale: "none" (the paper only centres) or "group": divide by the sample standard deviation of f(S), plus eps.

    Returns:
        [B] float32, a constant of the gradient (`scores` is detached). Each group sums to zero. Equal scores, or fewer
        than two valid members, give exact zeros, and so does every invalid member, whatever the scores beside it.

    Raises:
        ValueError: an argument is not as above.

    Source: GEM (arXiv 2511.13007), Eq. 2; the scaled form is GRPO's (arXiv 2402.03300).
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() != 1:
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        arguments.fail("scores", "a floating-point tensor [B]", got)
    arguments.check_groups(group_size, group_ids, scores.shape[0], scores.device)
    valid = arguments.as_mask("valid", valid)
    if valid is not None:
        arguments.check_tensor("valid", valid, shape=scores.shape, dtypes=(torch.bool,), device=scores.device)
    arguments.check_choice("mapping", mapping, MAPPINGS)
    arguments.check_choice("scale", scale, SCALES)
    arguments.check_number("eps", eps)
    backend = arguments.check_backend(backend, scores.device)
    scores = scores.detach().float().contiguous()
    if group_ids is not None:
        return groups.by_id(scores, group_ids, valid, mapping, scale, float(eps))
    assert group_size is not None
    if scale == "group" and torch.compiler.is_compiling():  # as in `score_weights`
        centred = group_advantages_op(scores, group_size, valid, mapping, "none", 0.0, backend).view(-1, group_size)
        members = torch.ones_like(centred) if valid is None else valid.view(-1, group_size).float()
        return cpu.over_deviation(centred, members.sum(1, keepdim=True), eps).reshape(-1)
    return group_advantages_op(scores, group_size, valid, mapping, scale, float(eps), backend)


def counted_targets(targets: Tensor, completion_mask: Tensor | None, ignore_index: int) -> Tensor:
    """`targets`, with those that the mask leaves out replaced by `ignore_index`: their rows are then never read."""
    arguments.check_ignore_index(ignore_index, targets)
    return targets if completion_mask is None else targets.masked_fill(~completion_mask, ignore_index)


def fused_entropy_score(
    logits: Tensor,
    targets: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor,
    group_size: int | None = None,
    fork_weight: float = 1.0,
    top_m: float | int = 0.1,
    no_answer: str = "tail",
    valid: Tensor | None = None,
    mapping: str = "identity",
    scale: str = "none",
    eps: float = 1e-4,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
    score: LinearScore | None = None,
    group_ids: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> EntropyScoreOutput:
    """Logits -> log-probs, entropies, entropy scores and group advantages, from one read of the logits.

    `token_stats`, then `entropy_scores`, then `group_advantages`; each argument and formula is explained there. Rows
    that `completion_mask` leaves out are never read.

    Args:
        logits: [B, T, V] with `completion_mask` [B, T], or [N, V] with `cu_seqlens` [B + 1].
        targets: [B, T] or [N].
        answer_start: [B].
        group_size: G; sequences of one prompt stand together. Or group_ids: [B] integers, equal for one prompt.
        score: a `LinearScore` of named features in place of the paper's score; `fork_weight` is then left out.
        vocab_parallel: as for `token_stats`.

    Returns:
        EntropyScoreOutput: score, final_entropy, fork_entropy, valid, advantages [B]; logprobs and entropy shaped like
        `targets`. Gradients flow through logprobs and entropy; the rest are constants of the gradient.

    Raises:
        ValueError: an argument is not as the three functions ask.

    Example:
        >>> out = fused_entropy_score(logits, ids, completion_mask=mask, answer_start=start, group_size=8)
        >>> loss = -(out.advantages[:, None] * out.logprobs).sum() / out.valid.sum()

    Source: GEM (arXiv 2511.13007), Eq. 1 and 2.
    """
    arguments.check_logits(logits, targets)
    completion_mask, valid = _masks(completion_mask, valid)
    arguments.check_layout(targets, "targets", completion_mask, cu_seqlens)
    stats = token_stats(
        logits,
        counted_targets(targets, completion_mask, ignore_index),
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    spans = Spans(completion_mask, cu_seqlens, answer_start, top_m, no_answer, valid, backend)
    scores = completion_scores(stats.entropy, stats.logprobs, spans, fork_weight, score)
    grouping = {"group_size": group_size, "group_ids": group_ids}
    return with_advantages(stats, scores, **grouping, mapping=mapping, scale=scale, eps=eps, backend=backend)


def with_advantages(stats: TokenStats, scores: EntropyScores, **options: Any) -> EntropyScoreOutput:
    """options: of `group_advantages`."""
    advantages = group_advantages(scores.score, valid=scores.valid, **options)
    return EntropyScoreOutput(
        scores.score,
        scores.final_entropy,
        scores.fork_entropy,
        scores.valid,
        advantages,
        stats.logprobs,
        stats.entropy,
    )
