"""Candidates -> token entropies -> scores -> ranking -> group advantages, with no gradient and no padding counted."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from gem.config.settings import Scoring
from gem.model.forward import Policy, measured_stats
from gem.progress import Bar
from gem.rollout.sample import Rollout
from gem.scoring import ranking
from gem_kernels import CompletionFeatures, EntropyScores, LinearScore, completion_features, group_advantages


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its scores. All on the CPU: [B] but where it says otherwise.

    `scores.valid` is what counts: not empty, answer found and ended where so configured, not trimmed. Advantages are
    0 elsewhere. `advantages` came from `rewards`, which are the scores or their strengths, plus the overlong penalty.
    """

    rollout: Rollout
    scores: EntropyScores  # the paper's, or the linear score that was asked for
    features: CompletionFeatures
    advantages: torch.Tensor
    logprobs: torch.Tensor  # [B, T] fp32
    entropy: torch.Tensor  # [B, T] fp32, nats
    rewards: torch.Tensor  # float64
    standard_errors: torch.Tensor  # of the scores, float64, nats
    strengths: torch.Tensor  # Bradley-Terry log-strengths, float64, mean 0 in a group
    trimmed: torch.Tensor  # bool: left out as an outlier
    pairs: torch.Tensor  # [K, 2] int64: rows of the best and the worst candidate of a group, by reward
    pairs_decided: float  # share of pairs of candidates that their standard errors tell apart; NaN without pairs


def score_rollout(
    policy: Policy,
    rollout: Rollout,
    scoring: Scoring,
    *,
    linear: LinearScore | None = None,
    batch_size: int,
    bar: Bar | None = None,
) -> ScoredRollout:
    """Scores every candidate with the model as it is now, `batch_size` prompts a forward.

    linear: a score of named features (a calibrated one, say) in place of the paper's, whose weights then do not count.

    Where the sampler recorded log-probs and entropies (of that same model, at `score_temperature`) there is no
    forward at all.
    """
    if rollout.entropy is None or rollout.logprobs is None:
        stats = measured_stats(
            policy, rollout.batch, temperature=scoring.score_temperature, batch_size=batch_size, bar=bar
        )
        logprobs, entropy = stats.logprobs, stats.entropy
    else:
        logprobs, entropy = rollout.logprobs, rollout.entropy
        if bar is not None:
            bar.advance(len(rollout.batch.prompt_ids))
    return rank_candidates(rollout, logprobs, entropy, scoring, linear)


def rank_candidates(
    rollout: Rollout,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    scoring: Scoring,
    linear: LinearScore | None = None,
) -> ScoredRollout:
    """Token statistics [B, T] -> scores, their errors, the reward of each candidate, advantages and pairs.

    Trimming looks at the scores; the overlong penalty is added to the reward before it is mapped.
    """
    batch = rollout.batch
    groups = (-1, batch.num_generations)
    linear = linear or paper_score(scoring)
    features = rollout_features(rollout, logprobs, entropy, scoring)
    scores = EntropyScores(features.score(linear), features.final_entropy, features.fork_entropy, features.valid)
    kept = ranking.trim(scores.score.view(groups), scores.valid.view(groups), scoring)
    errors = ranking.score_standard_errors(
        entropy, logprobs, batch.completion_mask, rollout.spans.answer_start, batch.num_generations,
        linear=linear, top_m=scoring.top_m,
    )  # fmt: skip
    wins = ranking.win_probabilities(scores.score.view(groups), errors, kept)
    strengths = ranking.bradley_terry(wins, kept)
    rewards = strengths if scoring.ranking == "bradley_terry" else scores.score.double().view(groups)
    if scoring.overlong_buffer:
        penalty = overlong_penalty(batch.lengths, scoring.max_completion_length, scoring.overlong_buffer)
        rewards = rewards + scoring.overlong_penalty * penalty.view(groups)
    advantages = group_advantages(
        rewards.flatten().float(), batch.num_generations, valid=kept.flatten(),
        mapping=scoring.reward_mapping, scale=scoring.reward_scale,
    )  # fmt: skip
    pairs = ranking.best_and_worst(rewards, kept)
    different = torch.tensor([not _same_tokens(batch, *pair) for pair in pairs.tolist()], dtype=torch.bool)
    return ScoredRollout(
        rollout=rollout,
        scores=dataclasses.replace(scores, valid=kept.flatten()),
        features=features,
        advantages=advantages,
        logprobs=logprobs,
        entropy=entropy,
        rewards=rewards.flatten(),
        standard_errors=errors.flatten(),
        strengths=strengths.flatten(),
        trimmed=scores.valid & ~kept.flatten(),
        pairs=pairs[different],
        pairs_decided=ranking.pairs_decided(wins, kept),
    )


def overlong_penalty(lengths: torch.Tensor, max_completion_length: int, buffer: int) -> torch.Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): lengths [B] -> [B] float64 in [-1, 0].

    0 up to max_completion_length - buffer tokens, then falling linearly to -1 at max_completion_length.
    """
    over = lengths.double() - (max_completion_length - buffer)
    return -(over / buffer).clamp(0, 1)


def ranking_metrics(scored: ScoredRollout) -> dict[str, float]:
    """What a step's metrics say of the ranking; NaN (a share of nothing) is left out."""
    valid = scored.scores.valid
    row = {
        "gem/score_standard_error": float(scored.standard_errors[valid].mean()) if bool(valid.any()) else math.nan,
        "gem/pairs_decided": scored.pairs_decided,
        "gem/valid": float(valid.double().mean()),
        "gem/trimmed": float(scored.trimmed.double().mean()),
    }
    row |= {f"gem/answer_span/{name}": rate for name, rate in scored.rollout.spans.hit_rates.items()}
    return {key: value for key, value in row.items() if not math.isnan(value)}


def paper_score(scoring: Scoring) -> LinearScore:
    """S = -final_weight * H_final + fork_weight * H_fork."""
    return LinearScore({"final_entropy": -scoring.final_weight, "fork_entropy": scoring.fork_weight})


def rollout_features(
    rollout: Rollout, logprobs: torch.Tensor, entropy: torch.Tensor, scoring: Scoring
) -> CompletionFeatures:
    """What a linear score is made of, one number a candidate."""
    return completion_features(
        entropy,
        logprobs,
        completion_mask=rollout.batch.completion_mask,
        answer_start=rollout.spans.answer_start,
        top_m=scoring.top_m,
        no_answer=scoring.no_answer,
        valid=~rollout.truncated if scoring.mask_truncated else None,
    )


def _same_tokens(batch, one: int, other: int) -> bool:
    """Equal completions can differ in score by rounding; they make no pair."""
    return bool(
        (batch.completion_mask[one] == batch.completion_mask[other]).all()
        and (batch.completion_ids[one] == batch.completion_ids[other]).all()
    )
