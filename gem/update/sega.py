"""Optimizer steps: reflective SFT on chosen answers, SEGA on scored candidates, DPO on pairs.

A step is a fixed set of sequences; micro-batches and processes only bound memory and time. Each loss is divided by the
count of the whole step, which every process knows, so the gradient is the same for 1 x 8 and 4 x 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gem.data.batches import select_groups
from gem.model.forward import completion_policy_loss, completion_sega_loss
from gem.parallel import processes
from gem.scoring.score import ScoredRollout
from gem.update.optimizer import StepResult, Trainer


@dataclass(frozen=True)
class SegaUpdate:
    """How a scored rollout becomes gradients.

    With one iteration, no clipping and no KL term the loss of a token is -A logprob (gem_kernels.sega_loss); otherwise

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k3,    r = exp(logprob - logprob when it was sampled)
        k3 = exp(d) - d - 1,    d = logprob of the starting policy - logprob

    (PPO's clipped surrogate, arXiv 1707.06347, Eq. 7, two-sided as in DAPO, arXiv 2503.14476, Eq. 8; k3 as in GRPO,
    arXiv 2402.03300, Eq. 4). Tokens are weighed and summed as `loss_type` says. Where r = 1 the two have one gradient.
    """

    loss_type: str = "sum"
    max_completion_length: int = 256
    temperature: float = 1.0
    micro_batch_size: int = 4  # prompts
    num_iterations: int = 1  # optimizer steps on the same candidates
    epsilon: float | None = None  # none: r is not clipped
    epsilon_high: float | None = None  # none: epsilon
    beta: float = 0.0  # per token, nats
    padding_free: bool = False

    @property
    def is_plain(self) -> bool:
        return self.num_iterations == 1 and self.epsilon is None and self.beta == 0


def sega_step(
    trainer: Trainer, scored: ScoredRollout, update: SegaUpdate, *, ref_logprobs: Tensor | None = None
) -> StepResult | None:
    """`num_iterations` steps on the candidates' loss; None, and no step, where nothing has a gradient.

    Groups whose advantages are all zero add nothing but their KL term; where there is none they are not run, but stay
    in the denominator.

    Args:
        scored: of the whole step, on every process; its log-probs are those of the policy that sampled.
        ref_logprobs: [B, T], those of the starting policy; needed where beta > 0, else only for the metric "kl".
    """
    if update.beta > 0 and ref_logprobs is None:
        raise ValueError("ref_logprobs: expected the starting policy's log-probs where beta > 0, got None")
    groups = groups_with_gradient(scored) if update.beta == 0 else groups_with_valid(scored)
    if not groups:
        return None
    lengths = scored.rollout.batch.lengths.view(-1, scored.rollout.batch.num_generations)
    groups.sort(key=lambda group: int(lengths[group].max()))  # of like length: less padding
    first = trainer.learning_rate
    if update.is_plain:
        results = [_plain_iteration(trainer, scored, update, groups)]
    else:
        inputs = _token_inputs(scored, update, ref_logprobs)
        results = [_clipped_iteration(trainer, scored, update, groups, inputs) for _ in range(update.num_iterations)]
    num_tokens = int(lengths[groups].sum()) * len(results)
    num_sequences = len(groups) * lengths.shape[1]
    return replace(_mean(results), learning_rate=first, num_tokens=num_tokens, num_sequences=num_sequences)


def _plain_iteration(trainer: Trainer, scored: ScoredRollout, update: SegaUpdate, groups: list[int]) -> StepResult:
    batch, valid = scored.rollout.batch, scored.scores.valid
    denominator = sega_denominator(
        valid, batch.lengths, update.loss_type, max_completion_length=update.max_completion_length
    )
    trainer.model.train()
    for members, weight in trainer.micro_batches(groups, update.micro_batch_size):
        part, rows = select_groups(batch, members)
        output = completion_sega_loss(
            trainer.model,
            part,
            advantages=scored.advantages[rows],
            valid=valid[rows],
            denominator=denominator,
            loss_type=update.loss_type,
            max_completion_length=update.max_completion_length,
            temperature=update.temperature,
            padding_free=update.padding_free,
        )
        trainer.backward(weight * output.loss)
    trainer.model.eval()
    outcome = trainer.step()
    return StepResult(outcome.loss, outcome.grad_norm, 0.0, 0, 0, outcome.skipped)


def _clipped_iteration(
    trainer: Trainer, scored: ScoredRollout, update: SegaUpdate, groups: list[int], inputs: dict[str, Tensor]
) -> StepResult:
    low, high = clip_range(update.epsilon, update.epsilon_high)

    def token_loss(logprobs: Tensor, entropy: Tensor, **inputs: Tensor) -> Tensor:
        return clipped_loss(logprobs, **inputs, low=low, high=high, beta=update.beta)

    sums = torch.zeros(4, dtype=torch.float64)
    trainer.model.train()
    for members, weight in trainer.micro_batches(groups, update.micro_batch_size):
        part, rows = select_groups(scored.rollout.batch, members)
        width = part.completion_ids.shape[1]
        mine = {name: value[rows, :width] for name, value in inputs.items()}
        output = completion_policy_loss(
            trainer.model,
            part,
            token_loss,
            mine,
            temperature=update.temperature,
            padding_free=update.padding_free,
        )
        trainer.backward(weight * output.loss)
        if weight:
            sums += drift_sums(output.logprobs.cpu(), mine, low, high)
    trainer.model.eval()
    outcome = trainer.step()
    count, clipped_low, clipped_high, kl = processes.sum_over_processes(sums.tolist())
    metrics = {
        "clip_ratio/low_mean": clipped_low / max(1.0, count),
        "clip_ratio/high_mean": clipped_high / max(1.0, count),
        "clip_ratio/region_mean": (clipped_low + clipped_high) / max(1.0, count),
    }
    if "ref" in inputs:
        metrics["kl"] = kl / max(1.0, count)
    return StepResult(outcome.loss, outcome.grad_norm, 0.0, 0, 0, outcome.skipped, metrics)


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
    """[tokens that count, those clipped below, those clipped above, the sum of their k3], float64."""
    counts = inputs["weights"] != 0
    ratio = (logprobs - inputs["old"]).exp()
    below = counts & (ratio < low) & (inputs["advantages"] < 0)
    above = counts & (ratio > high) & (inputs["advantages"] > 0)
    kl = k3(logprobs.double(), inputs["ref"].double())[counts].sum() if "ref" in inputs else torch.zeros(())
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


def sega_denominator(
    valid: torch.Tensor, lengths: torch.Tensor, loss_type: str, *, max_completion_length: int
) -> float:
    """Z of the SEGA loss over a whole step: valid sequences, their tokens, or sequences * max_completion_length."""
    if loss_type == "token":
        return float(lengths[valid].sum())
    sequences = float(valid.sum())
    return sequences * max_completion_length if loss_type == "constant" else sequences


def _groups_with(rows: Tensor, scored: ScoredRollout) -> list[int]:
    return rows.view(-1, scored.rollout.batch.num_generations).any(1).nonzero().flatten().tolist()


def _token_inputs(scored: ScoredRollout, update: SegaUpdate, ref_logprobs: Tensor | None) -> dict[str, Tensor]:
    """What each token's loss needs, [B, T]: `weights` is c_i / Z, 0 under the padding and on invalid sequences."""
    batch, valid = scored.rollout.batch, scored.scores.valid
    denominator = sega_denominator(
        valid, batch.lengths, update.loss_type, max_completion_length=update.max_completion_length
    )
    weights = batch.completion_mask * (valid / max(1.0, denominator))[:, None]
    if update.loss_type == "mean":
        weights = weights / batch.lengths.clamp_min(1)[:, None]
    inputs = {
        "old": scored.logprobs,
        "advantages": scored.advantages.float()[:, None].expand(weights.shape),
        "weights": weights.float(),
    }
    return inputs if ref_logprobs is None else {**inputs, "ref": ref_logprobs}


def _mean(results: Sequence[StepResult]) -> StepResult:
    """Of the steps that were taken; of all where none was."""
    taken = [result for result in results if not result.skipped] or results
    metrics = {name: sum(r.metrics[name] for r in taken) / len(taken) for name in taken[0].metrics}
    return StepResult(
        loss=sum(r.loss for r in taken) / len(taken),
        grad_norm=sum(r.grad_norm for r in taken) / len(taken),
        learning_rate=0.0,
        num_tokens=0,
        num_sequences=0,
        skipped=any(result.skipped for result in results),
        metrics=metrics,
    )
