"""A step's numbers as one row: TRL's names where TRL has one, gem/ for what is GEM's."""

from __future__ import annotations

from typing import Any

from gem.evaluation.evaluate import summarize
from gem.scoring.forks import fork_tokens, repeated_tokens
from gem.scoring.score import ScoredRollout, ranking_metrics
from gem.update.optimizer import StepResult
from gem.update.sega import groups_with_gradient


def step_metrics(result: StepResult) -> dict[str, Any]:
    """Of a step; without learning rate and tokens where there was nothing to learn from."""
    row: dict[str, Any] = {"loss": result.loss, "grad_norm": result.grad_norm}
    if result.learning_rate is not None:
        row |= {"learning_rate": result.learning_rate, "num_tokens": result.num_tokens}
    row |= result.metrics
    return {**row, "skipped": True} if result.skipped else row


def rollout_metrics(scored: ScoredRollout) -> dict[str, Any]:
    """Of the candidates of a step."""
    batch = scored.rollout.batch
    num_groups = len(batch.prompt_ids)
    means = summarize(scored)
    zero_groups = num_groups - len(groups_with_gradient(scored))
    return {
        "reward": float(scored.rewards[scored.scores.valid].mean()) if bool(scored.scores.valid.any()) else 0.0,
        "reward_std": reward_std(scored),
        "frac_reward_zero_std": zero_groups / num_groups,
        "entropy": float(scored.entropy.sum()) / int(batch.lengths.sum()),
        "completions/mean_length": means.mean_length,
        "completions/min_length": int(batch.lengths.min()),
        "completions/max_length": int(batch.lengths.max()),
        "completions/clipped_ratio": means.clipped_ratio,
        "gem/score": means.score,
        "gem/h_final": means.h_final,
        "gem/h_fork": means.h_fork,
        "gem/answer_span_found": means.answer_span_found,
        **ranking_metrics(scored),
    }


def reward_std(scored: ScoredRollout) -> float:
    """The mean over the groups of the sample deviation of their rewards, of candidates that count; 0 without two."""
    rewards, valid = (x.view(-1, scored.rollout.batch.num_generations) for x in (scored.rewards, scored.scores.valid))
    found = [float(row[counts].std()) for row, counts in zip(rewards, valid) if int(counts.sum()) >= 2]
    return sum(found) / len(found) if found else 0.0


def fork_repetition(scored: ScoredRollout, top_m: float | int) -> float:
    """Mean over the completions with fork tokens of the share of these that repeat; 0 where there is none."""
    batch = scored.rollout.batch
    fork = fork_tokens(scored.entropy, batch.completion_mask, scored.rollout.spans.answer_start, top_m)
    repeats = repeated_tokens(batch.completion_ids, batch.completion_mask) & fork
    counts = fork.sum(1)
    shares = repeats.sum(1)[counts > 0] / counts[counts > 0]
    return float(shares.double().mean()) if len(shares) else 0.0
