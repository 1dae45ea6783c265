"""The SEGA loss: a policy gradient weighted by the advantages that the model's own entropies give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments
from .logit_stats import token_stats
from .scores import Spans, completion_scores, counted_targets, group_advantages
from .types import LinearScore, SegaOutput, VocabParallel

LOSS_TYPES = ("sum", "mean", "token", "constant")


def token_counts(targets: Tensor, completion_mask: Tensor | None, cu_seqlens: Any, ignore_index: int) -> Tensor:
    """Tokens that count in each sequence, [B] float32."""
    kept = targets != ignore_index
    if completion_mask is not None:
        return (kept & completion_mask).sum(1).float()
    running = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    ends = cu_seqlens.long().clamp(0, targets.shape[0])
    return (running[ends[1:]] - running[ends[:-1]]).float()


def _per_token(values: Tensor, targets: Tensor, completion_mask: Tensor | None, cu_seqlens: Any) -> Tensor:
    """[B] -> shaped like `targets`: each token the value of its sequence."""
    if completion_mask is not None:
        return values[:, None].expand(targets.shape)
    token = torch.arange(targets.shape[0], dtype=torch.int64, device=targets.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long().contiguous(), token, right=True)
    return values[sequence.clamp(max=values.shape[0] - 1)]


def _as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """[] float32, without a wait for the device."""
    if isinstance(value, Tensor) and value.device == device:
        return value.float()
    value = float(value)  # of a tensor on the host: a kernel's argument, where a copy to the device would wait for it
    if torch.compiler.is_compiling():  # a product takes another number without another compilation
        return torch.ones((), dtype=torch.float32, device=device) * value
    return torch.full((), value, dtype=torch.float32, device=device)


def sequence_weights(
    counts: Tensor, valid: Tensor, loss_type: str, max_completion_length: Any, denominator: float | Tensor | None
) -> Tensor:
    """c_i / Z, [B] float32; 0 for invalid sequences and where Z is 0."""
    if denominator is not None:
        Z = _as_scalar(denominator, counts.device)
    elif loss_type == "token":
        Z = torch.where(valid, counts, 0.0).sum()
    elif loss_type == "constant":
        Z = valid.sum().float() * max_completion_length
    else:
        Z = valid.sum().float()
    c = 1.0 / counts.clamp(min=1.0) if loss_type == "mean" else torch.ones_like(counts)
    return torch.where(valid & (Z != 0), c / torch.where(Z == 0, 1.0, Z), 0.0)


def weighted_sum(weights: Tensor, logprobs: Tensor) -> Tensor:
    """sum w * logprob, where a token without weight counts for nothing, were its target impossible (0 * -inf)."""
    return torch.where((weights == 0) & logprobs.isneginf(), 0.0, weights * logprobs).sum()


def check_loss(loss_type, max_completion_length, denominator, advantages, groups, answer_start, no_answer, B, dev):
    """groups: (group_size, group_ids)"""
    arguments.check_choice("loss_type", loss_type, LOSS_TYPES)
    if max_completion_length is not None:
        arguments.check_count("max_completion_length", max_completion_length)
    elif loss_type == "constant" and denominator is None:
        arguments.fail("max_completion_length", "given for loss_type='constant'", None)
    if isinstance(denominator, Tensor):
        arguments.check_tensor("denominator", denominator, shape=())
        if denominator.requires_grad:
            arguments.fail("denominator", "without requires_grad", "requires_grad=True")
    elif denominator is not None:
        arguments.check_number("denominator", denominator)
        if denominator < 0:
            arguments.fail("denominator", "0 or more", denominator)
    if advantages is None:
        arguments.check_groups(groups[0], groups[1], B, dev)
        if answer_start is None:
            arguments.fail("answer_start", "given where `advantages` is not", None)
        return
    arguments.check_tensor("advantages", advantages, shape=(B,), device=dev)
    if not advantages.is_floating_point():
        arguments.fail("advantages", "of a floating-point dtype", advantages.dtype)
    if advantages.requires_grad:
        arguments.fail("advantages", "without requires_grad (they are constants of the gradient; detach them)", "True")
    if answer_start is None and no_answer == "exclude":
        arguments.fail("answer_start", "given with no_answer='exclude'", None)


def sega_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    answer_start: Tensor | None = None,
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
    advantages: Tensor | None = None,
    loss_type: str = "sum",
    max_completion_length: int | None = None,
    denominator: float | Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
    score: LinearScore | None = None,
    group_ids: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> SegaOutput:
    """Self-evaluated group advantage loss, from logits.

        L = -(1/Z) sum_i A_i c_i sum_t logprob_{i,t}

        loss_type    c_i        Z
        "sum"        1          valid sequences                              (the paper)
        "mean"       1/len_i    valid sequences
        "token"      1          tokens of valid sequences                    (DAPO)
        "constant"   1          valid sequences * max_completion_length      (Dr. GRPO)

    A comes from the entropies of these very logits (`entropy_scores`, `group_advantages`) and is a constant of the
    gradient: dL/dlogprob_{i,t} = -A_i c_i / Z, and nothing flows through the entropy.

    Args:
        logits, targets, completion_mask, cu_seqlens, temperature, softcap, ignore_index, inplace_backward, backend,
            vocab_parallel: as for `token_stats` and `entropy_scores`.
        answer_start, group_size, group_ids, score, fork_weight, top_m, no_answer, valid, mapping, scale, eps: as for
            `fused_entropy_score`. Needed only where `advantages` is not given, but for `valid`.
        advantages: [B]: use these, not the logits' own. Invalid sequences still count for nothing.
        denominator: Z. A step split into micro-batches passes the Z of the whole step, and the sum of the parts'
            losses and gradients is that of the whole. Where Z is 0 the loss is 0.

    Returns:
        SegaOutput(loss, ...): `loss` a float32 scalar; the rest is detached.

    Raises:
        ValueError: an argument is not as above.

    Source: GEM (arXiv 2511.13007), Eq. 2.
    """
    arguments.check_logits(logits, targets)
    completion_mask = arguments.as_mask("completion_mask", completion_mask)
    valid = arguments.as_mask("valid", valid)
    B = arguments.check_layout(targets, "targets", completion_mask, cu_seqlens)
    groups = (group_size, group_ids)
    check_loss(
        loss_type, max_completion_length, denominator, advantages, groups, answer_start, no_answer, B, logits.device
    )
    if answer_start is None:
        answer_start = torch.full((B,), -1, dtype=torch.int64, device=logits.device)
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
    entropy = stats.entropy.detach()
    spans = Spans(completion_mask, cu_seqlens, answer_start, top_m, no_answer, valid, backend)
    scores = completion_scores(entropy, stats.logprobs, spans, fork_weight, score)
    if advantages is None:
        options: dict[str, Any] = {
            "mapping": mapping,
            "scale": scale,
            "eps": eps,
            "backend": backend,
            "group_ids": group_ids,
        }
        advantages = group_advantages(scores.score, group_size, valid=scores.valid, **options)
    advantages = torch.where(scores.valid, advantages.float(), 0.0)
    counts = token_counts(targets, completion_mask, cu_seqlens, ignore_index)
    weights = sequence_weights(counts, scores.valid, loss_type, max_completion_length, denominator)
    # Ignored tokens have logprob 0 and gradient 0 already.
    weights = _per_token(-advantages * weights, targets, completion_mask, cu_seqlens)
    return SegaOutput(
        weighted_sum(weights, stats.logprobs), scores.score, scores.final_entropy, scores.fork_entropy, scores.valid,
        advantages, stats.logprobs.detach(), entropy,
    )  # fmt: skip
