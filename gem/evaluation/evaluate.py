"""What a model is worth on held-out pairs: preference accuracy and its calibration, answer accuracy, and whether the
entropy score of its own candidates knows right from wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from gem.config.settings import EvaluationSettings, Sampling, Scoring
from gem.data.answers import answers_match
from gem.data.batches import TokenizedPair
from gem.data.prompts import TextFormat
from gem.model.forward import Policy, pair_logprobs
from gem.progress import progress
from gem.rollout.sample import roll_out
from gem.scoring.score import ScoredRollout, score_rollout
from gem.statistics import (
    Calibration,
    Estimate,
    auroc_estimates,
    calibration,
    majority_answer,
    mean_estimate,
    share_estimate,
)
from gem_kernels import LinearScore


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Mean over pairs of 1[r(chosen) > r(rejected)], ties one half, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    num_pairs: int
    margin: float  # mean of r(chosen) - r(rejected), nats
    margin_low: float
    margin_high: float


@dataclass(frozen=True)
class AnswerAccuracy:
    """Exact match of the greedy answer, over problems whose answer is known, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    num_problems: int
    answer_span_found: float  # share of completions with a final answer


@dataclass(frozen=True)
class CandidateScores:
    """Means over the valid candidates of sampled groups; entropies in nats."""

    score: float
    h_final: float
    h_fork: float
    num_candidates: int  # valid ones
    answer_span_found: float
    mean_length: float  # tokens
    clipped_ratio: float  # share with no end token
    pairs_decided: float | None  # share of pairs of candidates that their standard errors tell apart


@dataclass(frozen=True)
class SampledAnswers:
    """How the sampled candidates of problems with known answers fare, and what their scores know of it."""

    accuracy: Estimate  # of single candidates
    majority: Estimate  # of the answer that most of a problem's candidates give
    best_score: Estimate  # of the candidate with the highest score
    auroc: Estimate | None  # of the score against correctness; None: all right or all wrong
    auroc_within: Estimate | None  # the same among the candidates of one problem


@dataclass(frozen=True)
class CandidateSettings:
    """How candidates are drawn and scored. linear: the score in place of the paper's."""

    sampling: Sampling
    scoring: Scoring
    linear: LinearScore | None = None


@dataclass(frozen=True)
class Evaluation:
    """`preference` is the one of `preferences` that was asked for: "sum", "mean", or "relative" to a reference."""

    preference: PreferenceAccuracy
    preferences: dict[str, PreferenceAccuracy]
    calibration: Calibration  # of sigma(beta * (r(chosen) - r(rejected))), r as in `preference`
    answers: AnswerAccuracy | None  # None: no answer is known, or not asked for
    candidates: CandidateScores | None
    sampled: SampledAnswers | None
    logprobs: Tensor  # [N, 2] float64: of (chosen, rejected), whole; the reference of a later evaluation
    seconds: float
    sampled_rates: Tensor | None = None  # [P] float64: share of right candidates of each problem of `sampled`
    score: Estimate | None = None  # held-out pair accuracy of the score that is trained on
    score_wins: Tensor | None = None  # [N] float64: 1 where that score prefers the chosen answer, a tie one half
    score_is_fitted: bool = False  # the candidates' score is one of weights, not the paper's S


def evaluate(
    policy: Policy,
    form: TextFormat,
    pairs: Sequence[TokenizedPair],
    settings: EvaluationSettings,
    how: CandidateSettings,
    *,
    console: Console,
    name: str,
    reduction: str | None = None,
    reference: Tensor | None = None,
) -> Evaluation:
    """All of it. `eval_generate` problems are answered greedily, candidates of `eval_sample` prompts scored.

    reduction: "sum", "mean" or "relative"; None: `preference_reduction`. "relative" needs `reference`, the `logprobs`
    of the starting policy on the same pairs.
    """
    start = time.monotonic()
    sampling, scoring = how.sampling, how.scoring
    reduction, seed, size = reduction or settings.preference_reduction, settings.seed, settings.eval_batch_size
    problems = [pair for pair in pairs if pair.answer is not None][: settings.eval_generate]
    sampled = pairs[: settings.eval_sample]
    answers = candidates = outcomes = rates = None
    with progress(console, f"Evaluation {name}", len(pairs) + len(problems) + 2 * len(sampled)) as bar:
        logprobs = pair_logprobs(policy, pairs, pad_id=form.pad_id, batch_size=size, bar=bar)
        rewards = reward_differences(logprobs, pairs, reference)
        prompts = [pair.prompt_ids for pair in pairs]
        preferences = {kind: _preference(values, prompts, seed) for kind, values in rewards.items()}
        if problems:
            greedy = Sampling(num_generations=1, max_completion_length=sampling.max_completion_length, temperature=0.0)
            asked = [pair.prompt_ids for pair in problems]
            batch_size = size * sampling.num_generations
            rollout = roll_out(policy, form, asked, greedy, seed=seed, batch_size=batch_size, bar=bar)
            right = [answers_match(given, pair.answer) for given, pair in zip(rollout.spans.answers, problems)]
            share = share_estimate(torch.tensor(right), asked, seed)
            answers = AnswerAccuracy(share.value, share.low, share.high, share.count, rollout.spans.hit_rate)
        if sampled:
            rollout = roll_out(
                policy, form, [pair.prompt_ids for pair in sampled], sampling, seed=seed, batch_size=size,
                stats_temperature=scoring.score_temperature, bar=bar,
            )  # fmt: skip
            scored = score_rollout(policy, rollout, scoring, linear=how.linear, batch_size=size, bar=bar)
            candidates = summarize(scored)
            outcomes = sampled_answers(scored, sampled, seed)
            rates = sampled_rates(scored, sampled)
        bar.note(f"preference accuracy {preferences[reduction].accuracy:.3f}")
    return Evaluation(
        preference=preferences[reduction],
        preferences=preferences,
        calibration=calibration(rewards[reduction], settings.dpo_beta, prompts, seed=seed),
        answers=answers,
        candidates=candidates,
        sampled=outcomes,
        logprobs=logprobs,
        seconds=time.monotonic() - start,
        sampled_rates=rates,
        score_is_fitted=how.linear is not None,
    )


def reward_differences(
    logprobs: Tensor, pairs: Sequence[TokenizedPair], reference: Tensor | None = None
) -> dict[str, Tensor]:
    """r(chosen) - r(rejected) [N] float64 under each implicit reward, from the log-probs of whole answers [N, 2].

    sum        r = log p(answer | prompt)
    mean       r = log p(answer | prompt) / its tokens, the end-of-turn token one of them
    relative   r = log p(answer | prompt) - that of the reference; only where there is one
    """
    lengths = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
    rewards = {"sum": logprobs, "mean": logprobs / lengths}
    if reference is not None:
        rewards["relative"] = logprobs - reference.to(logprobs)
    return {kind: values[:, 0] - values[:, 1] for kind, values in rewards.items()}


def sampled_answers(scored: ScoredRollout, pairs: Sequence[TokenizedPair], seed: int = 0) -> SampledAnswers | None:
    """Right and wrong candidates of the problems whose answer is known; None where none is."""
    size = scored.rollout.batch.num_generations
    known = [i for i, pair in enumerate(pairs) if pair.answer is not None]
    if not known:
        return None
    answers = [scored.rollout.spans.answers[i * size : (i + 1) * size] for i in known]
    truths = [pairs[i].answer for i in known]
    correct = torch.tensor([[answers_match(a, truth) for a in group] for group, truth in zip(answers, truths)])
    majority = [answers_match(majority_answer(group), truth) for group, truth in zip(answers, truths)]
    scores, valid = (x.view(-1, size)[known] for x in (scored.scores.score, scored.scores.valid))
    best = scores.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    prompts = [pairs[i].prompt_ids for i in known]
    overall, within = auroc_estimates(scores, correct, valid, seed)
    return SampledAnswers(
        accuracy=share_estimate(correct.flatten(), [prompt for prompt in prompts for _ in range(size)], seed),
        majority=share_estimate(torch.tensor(majority), prompts, seed),
        best_score=share_estimate((correct & valid).gather(1, best).flatten(), prompts, seed),
        auroc=overall,
        auroc_within=within,
    )


def sampled_rates(scored: ScoredRollout, pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """Share of right candidates of each problem whose answer is known, [P] float64; None where none is."""
    size, answers = scored.rollout.batch.num_generations, scored.rollout.spans.answers
    right = [
        [answers_match(given, pair.answer) for given in answers[i * size : (i + 1) * size]]
        for i, pair in enumerate(pairs)
        if pair.answer is not None
    ]
    return torch.tensor(right, dtype=torch.float64).mean(1) if right else None


def _preference(differences: Tensor, prompts: Sequence[tuple[int, ...]], seed: int) -> PreferenceAccuracy:
    share = share_estimate((differences.sign() + 1) / 2, prompts, seed)
    margin = mean_estimate(differences, prompts, seed)
    return PreferenceAccuracy(share.value, share.low, share.high, share.count, margin.value, margin.low, margin.high)


def summarize(scored: ScoredRollout) -> CandidateScores:
    """Means of a scored rollout over its valid candidates; NaN where none is valid."""
    valid = scored.scores.valid
    batch = scored.rollout.batch

    def mean(values: torch.Tensor) -> float:
        return float(values[valid].double().mean()) if bool(valid.any()) else math.nan

    return CandidateScores(
        score=mean(scored.scores.score),
        h_final=mean(scored.scores.final_entropy),
        h_fork=mean(scored.scores.fork_entropy),
        num_candidates=int(valid.sum()),
        answer_span_found=scored.rollout.spans.hit_rate,
        mean_length=float(batch.lengths.double().mean()),
        clipped_ratio=float(scored.rollout.truncated.double().mean()),
        pairs_decided=None if math.isnan(scored.pairs_decided) else scored.pairs_decided,
    )
