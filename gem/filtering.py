"""Candidates -> token entropies -> scores -> group advantages, with no gradient and no padding counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gem.policy import completion_stats
from gem.progress import Progress
from gem.rollout import Rollout
from gem_kernels import EntropyScores, entropy_scores, group_advantages


@dataclass(frozen=True)
class Scoring:
    """S = -H_final + fork_weight * H_fork, and how scores become advantages (gem_kernels has the definitions)."""

    fork_weight: float = 1.0
    top_m: float | int = 0.1
    no_answer: str = "tail"
    mapping: str = "identity"
    scale: str = "none"
    temperature: float = 1.0  # of the entropies; 1.0 is the model itself, however it was sampled
    mask_truncated: bool = False


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its scores. All on the CPU: [B] but entropy and logprobs, which are [B, T] fp32."""

    rollout: Rollout
    scores: EntropyScores
    advantages: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor


def score_rollout(
    model: PreTrainedModel,
    rollout: Rollout,
    scoring: Scoring,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> ScoredRollout:
    """Scores every candidate with the model as it is now, `batch_size` prompts a forward."""
    batch = rollout.batch
    logprobs, entropy = token_statistics(model, rollout, scoring.temperature, batch_size, progress)
    scores = entropy_scores(
        entropy,
        completion_mask=batch.completion_mask,
        answer_start=rollout.spans.answer_start,
        fork_weight=scoring.fork_weight,
        top_m=scoring.top_m,
        no_answer=scoring.no_answer,
        valid=~rollout.truncated if scoring.mask_truncated else None,
    )
    advantages = group_advantages(
        scores.score, batch.num_generations, valid=scores.valid, mapping=scoring.mapping, scale=scoring.scale
    )
    return ScoredRollout(rollout, scores, advantages, logprobs, entropy)


@torch.no_grad()
def token_statistics(
    model: PreTrainedModel, rollout: Rollout, temperature: float, batch_size: int, progress: Progress | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs, entropy) of every candidate token, [B, T] fp32 on the CPU, zero under the padding."""
    model.eval()
    batch = rollout.batch
    logprobs = torch.zeros(batch.completion_ids.shape)
    entropy = torch.zeros(batch.completion_ids.shape)
    num_prompts = len(batch.prompt_ids)
    for start in range(0, num_prompts, batch_size):
        stop = min(start + batch_size, num_prompts)
        part = batch.select_prompts(start, stop)
        stats = completion_stats(model, part, temperature=temperature)
        rows = slice(start * batch.num_generations, stop * batch.num_generations)
        logprobs[rows, : stats.logprobs.shape[1]] = stats.logprobs.cpu()
        entropy[rows, : stats.entropy.shape[1]] = stats.entropy.cpu()
        if progress is not None:
            progress.advance(stop - start)
    return logprobs, entropy
