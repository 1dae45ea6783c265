"""SEGA: steps on scored candidates.

A step is a fixed set of sequences; micro-batches and processes only bound memory and time. Each loss is divided by the
count of the whole step, which every process knows, so the gradient is the same for 1 x 8 and 4 x 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gem.config.settings import SegaUpdate
from gem.data.batches import select_groups, to_device
from gem.model.forward import completion_policy_loss, completion_sega_loss
from gem.parallel import processes
from gem.scoring.score import ScoredRollout
from gem.update.optimizer import StepResult, Trainer


def sega_step(
    trainer: Trainer, scored: ScoredRollout, settings: SegaUpdate, *, ref_logprobs: Tensor | None = None
) -> StepResult:
    """`num_iterations` steps on the candidates' loss; NO_STEP where nothing has a gradient.

    Groups whose advantages are all zero add nothing but their KL term; without one they are not run, but stay in the
    denominator. Where all groups are like that there is no step, KL term or not: of weights that have not moved yet its
    gradient is rounding noise, which AdamW divides by its own size.

    Args:
        scored: of the whole step, on every process; its log-probs are those of the policy that sampled.
        ref_logprobs: [B, T], those of the starting policy; needed where beta > 0, else only for the metric "kl".
    """
    if settings.beta > 0 and ref_logprobs is None:
        raise ValueError("ref_logprobs: expected the starting policy's log-probs where beta > 0, got None")
    groups = groups_with_gradient(scored)
    if not groups:
        return trainer.skip(1 if settings.is_plain else settings.num_iterations)
    if settings.beta > 0:
        groups = groups_with_valid(scored)
    lengths = scored.rollout.batch.lengths.view(-1, scored.rollout.batch.num_generations)
    groups.sort(key=lambda group: int(lengths[group].max()))  # of like length: less padding
    if settings.is_plain:
        results = [_plain_iteration(trainer, scored, settings, groups)]
    else:
        inputs = _token_inputs(scored, settings, ref_logprobs)
        results = [
            _clipped_iteration(trainer, scored, settings, groups, inputs) for _ in range(settings.num_iterations)
        ]
    num_tokens = int(lengths[groups].sum()) * len(results)
    return replace(_mean(results), num_tokens=num_tokens, num_sequences=len(groups) * lengths.shape[1])


def _plain_iteration(trainer: Trainer, scored: ScoredRollout, settings: SegaUpdate, groups: list[int]) -> StepResult:
    batch, valid = scored.rollout.batch, scored.scores.valid
    denominator = sega_denominator(valid, batch.lengths, settings)

    def loss_of(members: list[int], weight: float) -> Tensor:
        part, rows = select_groups(batch, members)
        advantages = scored.advantages[rows]
        return completion_sega_loss(
            trainer.policy, part, settings, advantages=advantages, valid=valid[rows], denominator=denominator
        ).loss

    return trainer.take_step(groups, loss_of)


def _clipped_iteration(
    trainer: Trainer, scored: ScoredRollout, settings: SegaUpdate, groups: list[int], inputs: dict[str, Tensor]
) -> StepResult:
    low, high = clip_range(settings.epsilon, settings.epsilon_high)
    device = trainer.policy.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # read once, at the step's end

    def token_loss(logprobs: Tensor, entropy: Tensor, **inputs: Tensor) -> Tensor:
        return clipped_loss(logprobs, **inputs, low=low, high=high, beta=settings.beta)

    def loss_of(members: list[int], weight: float) -> Tensor:
        part, rows = select_groups(scored.rollout.batch, members)
        width = part.completion_ids.shape[1]
        mine = {name: to_device(value[rows, :width], device) for name, value in inputs.items()}
        output = completion_policy_loss(trainer.policy, part, token_loss, mine, temperature=settings.score_temperature)
        if weight:
            sums.add_(drift_sums(output.logprobs, mine, low, high))
        return output.loss

    result = trainer.take_step(groups, loss_of)
    count, clipped_low, clipped_high, kl = processes.sum_over_processes(sums.tolist())
    metrics = {
        "clip_ratio/low_mean": clipped_low / max(1.0, count),
        "clip_ratio/high_mean": clipped_high / max(1.0, count),
        "clip_ratio/region_mean": (clipped_low + clipped_high) / max(1.0, count),
    }
    if "ref" in inputs:
        metrics["kl"] = kl / max(1.0, count)
    return replace(result, metrics=metrics)


def clip_range(epsilon: float | None, epsilon_high: float | None) -> tuple[float, float]:
    """(1 - epsilon, 1 + epsilon_high), (0, inf) where nothing is clipped."""
    if epsilon is None:
        return 0.0, math.inf
    return 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)


def clipped_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref: Tensor | None = None,
    *,
    low: float,
    high: float,
    beta: float,
) -> Tensor:
    """sum over tokens of weights * (-min(r A, clip(r, low, high) A) + beta k3); a token of weight 0 counts nothing.

    All [n]; differentiable in `logprobs`: d/dlogprob is weights * (-A r, or 0 where the clip holds, + beta (1 - e^d)).
    """
    logprobs = torch.where(weights == 0, old, logprobs)
    ratio = (logprobs - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if beta and ref is not None:
        loss = loss + beta * k3(logprobs, ref)
    return (weights * loss).sum()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1, d = ref - logprob: per token, never negative, in the mean the KL from the reference, nats."""
    d = ref_logprobs - logprobs
    return torch.expm1(d) - d


def drift_sums(logprobs: Tensor, inputs: dict[str, Tensor], low: float, high: float) -> Tensor:
    """[tokens that count, those clipped below, those clipped above, the sum of their k3], float64; on any device."""
    counts = inputs["weights"] != 0
    ratio = (logprobs - inputs["old"]).exp()
    below = counts & (ratio < low) & (inputs["advantages"] < 0)
    above = counts & (ratio > high) & (inputs["advantages"] > 0)
    kl = torch.zeros_like(ratio[:0].sum())
    if "ref" in inputs:
        kl = torch.where(counts, k3(logprobs.double(), inputs["ref"].double()), 0.0).sum()
    return torch.stack([counts.sum(), below.sum(), above.sum(), kl]).double()


def mean_kl(scored: ScoredRollout, ref_logprobs: Tensor) -> float:
    """KL of the policy that sampled from the starting policy: the mean of k3 over all candidates' tokens, nats."""
    mask = scored.rollout.batch.completion_mask
    return float(k3(scored.logprobs.double(), ref_logprobs.double())[mask].mean())


def groups_with_gradient(scored: ScoredRollout) -> list[int]:
    """The prompts of which some candidate has an advantage that is not zero."""
    return _groups_with(scored.advantages != 0, scored)


def groups_with_valid(scored: ScoredRollout) -> list[int]:
    """The prompts of which some candidate counts."""
    return _groups_with(scored.scores.valid, scored)


def sega_denominator(valid: Tensor, lengths: Tensor, settings: SegaUpdate) -> float:
    """Z of the SEGA loss over a whole step: valid sequences, their tokens, or sequences * max_completion_length."""
    if settings.loss_type == "token":
        return float(lengths[valid].sum())
    sequences = float(valid.sum())
    return sequences * settings.max_completion_length if settings.loss_type == "constant" else sequences


def _groups_with(rows: Tensor, scored: ScoredRollout) -> list[int]:
    return rows.view(-1, scored.rollout.batch.num_generations).any(1).nonzero().flatten().tolist()


def _token_inputs(scored: ScoredRollout, settings: SegaUpdate, ref_logprobs: Tensor | None) -> dict[str, Tensor]:
    """What each token's loss needs, [B, T]: `weights` is c_i / Z, 0 under the padding and on invalid sequences."""
    batch, valid = scored.rollout.batch, scored.scores.valid
    denominator = sega_denominator(valid, batch.lengths, settings)
    weights = batch.completion_mask * (valid / max(1.0, denominator))[:, None]
    if settings.loss_type == "mean":
        weights = weights / batch.lengths.clamp_min(1)[:, None]
    inputs = {
        "old": scored.logprobs,
        "advantages": scored.advantages.float()[:, None].expand(weights.shape),
        "weights": weights.float(),
    }
    return inputs if ref_logprobs is None else {**inputs, "ref": ref_logprobs}


def _mean(results: Sequence[StepResult]) -> StepResult:
    """Of the steps that were taken, of all where none was; with the learning rate of the first."""
    taken = [result for result in results if not result.skipped] or results
    return replace(
        results[0],
        loss=sum(r.loss for r in taken) / len(taken),
        grad_norm=sum(r.grad_norm for r in taken) / len(taken),
        skipped=any(result.skipped for result in results),
        metrics={name: sum(r.metrics[name] for r in taken) / len(taken) for name in taken[0].metrics},
    )
