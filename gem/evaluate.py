"""What a model is worth on held-out pairs: preference accuracy, answer accuracy, and the scores of its candidates."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gem.data import TokenizedPair, collate
from gem.filtering import ScoredRollout, Scoring, score_rollout
from gem.policy import completion_stats
from gem.progress import Progress, progress
from gem.rollout import Sampling, roll_out
from gem.spans import answers_match


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Mean over pairs of 1[r(chosen) > r(rejected)], ties one half, with its 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    num_pairs: int
    margin: float  # mean of r(chosen) - r(rejected), nats


@dataclass(frozen=True)
class AnswerAccuracy:
    """Exact match of the greedy answer, over problems whose answer is known, with its 95 % Wilson interval."""

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


@dataclass(frozen=True)
class Evaluation:
    preference: PreferenceAccuracy
    answers: AnswerAccuracy | None  # None: no answer is known, or not asked for
    candidates: CandidateScores | None
    seconds: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenizedPair],
    *,
    sampling: Sampling,
    scoring: Scoring,
    end_token_ids: Sequence[int],
    marker: str,
    batch_size: int,
    reduction: str,
    num_generate: int,
    num_sample: int,
    seed: int,
    console: Console,
    name: str,
) -> Evaluation:
    """All of it. `num_generate` problems are answered greedily, candidates of `num_sample` prompts scored."""
    start = time.monotonic()
    problems = [pair for pair in pairs if pair.answer is not None][:num_generate]
    sampled = pairs[:num_sample]
    with progress(console, f"Evaluation {name}", len(pairs) + len(problems) + 2 * len(sampled)) as bar:
        preference = preference_accuracy(
            model, pairs, pad_id=tokenizer.pad_token_id, reduction=reduction, batch_size=batch_size, progress=bar
        )
        answers = candidates = None
        if problems:
            greedy = Sampling(num_generations=1, max_completion_length=sampling.max_completion_length, temperature=0.0)
            rollout = roll_out(
                model, tokenizer, [pair.prompt_ids for pair in problems], greedy, end_token_ids=end_token_ids,
                marker=marker, seed=seed, batch_size=batch_size * sampling.num_generations, progress=bar,
            )  # fmt: skip
            right = [answers_match(given, pair.answer) for given, pair in zip(rollout.spans.answers, problems)]
            low, high = wilson_interval(sum(right), len(right))
            accuracy = sum(right) / len(right)
            answers = AnswerAccuracy(accuracy, low, high, len(right), rollout.spans.hit_rate)
        if sampled:
            rollout = roll_out(
                model, tokenizer, [pair.prompt_ids for pair in sampled], sampling, end_token_ids=end_token_ids,
                marker=marker, seed=seed, batch_size=batch_size, progress=bar,
            )  # fmt: skip
            candidates = summarize(score_rollout(model, rollout, scoring, batch_size=batch_size, progress=bar))
        bar.note(f"preference accuracy {preference.accuracy:.3f}")
    return Evaluation(preference, answers, candidates, time.monotonic() - start)


def preference_accuracy(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    *,
    pad_id: int,
    reduction: str = "sum",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> PreferenceAccuracy:
    """How often the implicit reward prefers the chosen answer; `reduction` as in `implicit_rewards`."""
    chosen, rejected = implicit_rewards(
        model, pairs, pad_id=pad_id, reduction=reduction, batch_size=batch_size, progress=progress
    ).unbind(1)
    wins = float((chosen > rejected).sum()) + 0.5 * float((chosen == rejected).sum())
    low, high = wilson_interval(wins, len(pairs))
    return PreferenceAccuracy(wins / len(pairs), low, high, len(pairs), float((chosen - rejected).mean()))


@torch.no_grad()
def implicit_rewards(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    *,
    pad_id: int,
    reduction: str = "sum",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> torch.Tensor:
    """r = log p(answer | prompt), end-of-turn token included, of (chosen, rejected): [N, 2] float64.

    Both answers stand under the same prompt in the same batch. `reduction` "sum" is the log-prob of the whole answer,
    "mean" divides it by its tokens.
    """
    model.eval()
    # Pairs of like length together, so that little is padding; the rewards return in the order of `pairs`.
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].prompt_ids), len(pairs[i].chosen_ids)))
    rewards = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        answers = [ids for i in part for ids in (pairs[i].chosen_ids, pairs[i].rejected_ids)]
        batch = collate([pairs[i].prompt_ids for i in part], answers, pad_id)
        total = completion_stats(model, batch).logprobs.double().sum(1).cpu()
        if reduction == "mean":
            total = total / batch.lengths
        rewards[part] = total.view(-1, 2)
        if progress is not None:
            progress.advance(len(part))
    return rewards


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
    )


def wilson_interval(wins: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)   [Wilson 1927]."""
    share = wins / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
