"""Entropies -> the score of each sequence -> group advantages; and both straight from logits."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import arguments
from .backends.cpu import span_scores as cpu
from .logit_stats import token_stats
from .types import EntropyScoreOutput, EntropyScores, TokenStats

MAPPINGS = ("identity", "softmax", "rank")
SCALES = ("none", "group")
NO_ANSWER = ("tail", "exclude")


@torch.library.custom_op("gem_kernels::span_scores", mutates_args=())
def span_scores_op(
    entropy: Tensor,
    completion_mask: Optional[Tensor],  # noqa: UP045
    cu_seqlens: Optional[Tensor],  # noqa: UP045
    answer_start: Tensor,
    valid: Optional[Tensor],  # noqa: UP045
    fork_weight: float,
    top_numerator: int,
    top_denominator: int,
    exclude: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, T] or [N] float32 -> score, final_entropy, fork_entropy [B] float32, valid [B] bool."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        steps = cu_seqlens[1:] - cu_seqlens[:-1]
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != entropy.shape[0] or bool((steps < 0).any()):
            arguments.fail("cu_seqlens", f"non-decreasing from 0 to N = {entropy.shape[0]}", cu_seqlens.tolist())
    args = (entropy, completion_mask, cu_seqlens, answer_start, valid)
    if backend != "triton":
        return cpu.span_scores(*args, fork_weight, top_numerator, top_denominator, exclude)

    from .backends.triton import launch

    return launch.span_scores(*args, fork_weight, top_numerator, top_denominator, exclude)


@span_scores_op.register_fake
def _(entropy, completion_mask, cu_seqlens, answer_start, valid, *args):
    values = [torch.empty(answer_start.shape, dtype=torch.float32, device=entropy.device) for _ in range(3)]
    return (*values, torch.empty(answer_start.shape, dtype=torch.bool, device=entropy.device))


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
        completion_mask: [B, T] bool, True counts. A completion reaches from its first True to its last; leading False
            (a prompt) and holes (a tool's output) are allowed and never counted.
        cu_seqlens: [B + 1] int32, offsets of packed completions: 0, ..., N.
        answer_start: [B] integers, the answer's offset from the completion's first token. Negative, or not below the
            completion's length, means that no answer was found.
        fork_weight: lambda.
        top_m: a float in (0, 1] is a share, taken as the decimal it is written as; an int is a count.
        no_answer: "tail": the answer is then the last fifth, from 4 * length // 5 on; "exclude": it is invalid.
        valid: [B] bool; False leaves a sequence out (a truncated one, say).
        backend: as for `token_stats`. "torch" and the CPU go through the sequences one by one.

    Returns:
        EntropyScores(score, final_entropy, fork_entropy, valid), each [B]. Empty completions, and answer spans without
        a counted token, are invalid; an invalid sequence has zeros. The score is a constant of the gradient: `entropy`
        is detached.

    Raises:
        ValueError: an argument is not as above. `cu_seqlens` is looked at on the CPU; on a GPU it is clamped to [0, N].

    Source: GEM (arXiv 2511.13007), Eq. 1.
    """
    if not isinstance(entropy, Tensor) or not entropy.is_floating_point():
        arguments.fail("entropy", "a floating-point tensor", getattr(entropy, "dtype", type(entropy).__name__))
    B = arguments.check_layout(entropy, "entropy", completion_mask, cu_seqlens)
    arguments.check_tensor(
        "answer_start", answer_start, shape=(B,), dtypes=(torch.int64, torch.int32), device=entropy.device
    )
    if valid is not None:
        arguments.check_tensor("valid", valid, shape=(B,), dtypes=(torch.bool,), device=entropy.device)
    arguments.check_number("fork_weight", fork_weight)
    numerator, denominator = arguments.top_fraction(top_m)
    arguments.check_choice("no_answer", no_answer, NO_ANSWER)
    backend = arguments.check_backend(backend, entropy.device)
    return EntropyScores(
        *span_scores_op(
            entropy.detach().float(),
            completion_mask,
            cu_seqlens,
            answer_start,
            valid,
            float(fork_weight),
            numerator,
            denominator,
            no_answer == "exclude",
            backend,
        )
    )


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
    group_size: int,
    *,
    valid: Tensor | None = None,
    mapping: str = "identity",
    scale: str = "none",
    eps: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """A_i = f(S_i) - mean of f(S) over the valid members of i's group; optionally / (their standard deviation + eps).

    Args:
        scores: [B], any floating dtype; groups are runs of `group_size`.
        group_size: G, a divisor of B.
        valid: [B] bool; invalid members get 0 and are left out of mean and deviation.
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
    arguments.check_count("group_size", group_size)
    if scores.shape[0] % group_size:
        arguments.fail("group_size", f"a divisor of the number of scores, {scores.shape[0]}", group_size)
    if valid is not None:
        arguments.check_tensor("valid", valid, shape=scores.shape, dtypes=(torch.bool,), device=scores.device)
    arguments.check_choice("mapping", mapping, MAPPINGS)
    arguments.check_choice("scale", scale, SCALES)
    arguments.check_number("eps", eps)
    backend = arguments.check_backend(backend, scores.device)
    scores = scores.detach().float().contiguous()
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
    group_size: int,
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
) -> EntropyScoreOutput:
    """Logits -> log-probs, entropies, entropy scores and group advantages, from one read of the logits.

    `token_stats`, then `entropy_scores`, then `group_advantages`; each argument and formula is explained there. Rows
    that `completion_mask` leaves out are never read.

    Args:
        logits: [B, T, V] with `completion_mask` [B, T], or [N, V] with `cu_seqlens` [B + 1].
        targets: [B, T] or [N].
        answer_start: [B].
        group_size: G; sequences of one prompt stand together.

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
    arguments.check_layout(targets, "targets", completion_mask, cu_seqlens)
    stats = token_stats(
        logits,
        counted_targets(targets, completion_mask, ignore_index),
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    layout = {"completion_mask": completion_mask, "cu_seqlens": cu_seqlens, "answer_start": answer_start}
    span = {"fork_weight": fork_weight, "top_m": top_m, "no_answer": no_answer, "valid": valid}
    group = {"group_size": group_size, "mapping": mapping, "scale": scale, "eps": eps}
    return scored(stats, {**layout, **span}, group, backend)


def scored(stats: TokenStats, span: dict, group: dict, backend: str) -> EntropyScoreOutput:
    scores = entropy_scores(stats.entropy, **span, backend=backend)
    advantages = group_advantages(scores.score, **group, valid=scores.valid, backend=backend)
    return EntropyScoreOutput(
        scores.score,
        scores.final_entropy,
        scores.fork_entropy,
        scores.valid,
        advantages,
        stats.logprobs,
        stats.entropy,
    )
