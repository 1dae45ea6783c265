"""Rejection sampling: SFT on the best candidate of each prompt, by the score; if asked, of the agreed prompts alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gem.data.answers import normalize_answer
from gem.data.batches import TokenizedPair
from gem.scoring.score import ScoredRollout
from gem.update.optimizer import NO_STEP, StepResult, Trainer
from gem.update.sft import sft_step


@dataclass(frozen=True)
class Pick:
    """The candidate of a prompt that is learned: its row, and how far the prompt's candidates agree on an answer."""

    row: int
    agreement: float


def pick_candidates(scored: ScoredRollout, share: float = 1.0) -> list[Pick]:
    """The best candidate of each prompt, in the order of the prompts.

    S are the rewards: the scores, or their strengths. Candidates that count are valid and have ended. With share = 1
    the best is the one of the highest S. Below, the answers of a prompt vote, a candidate with weight

        v_i = e^(S_i) / sum_j e^(S_j)    over the prompt's candidates that count

    The agreement is the sum of v over the answer that has most of it (answers equal after normalisation; none: no
    vote, of equals the one given first). The ceil(share * P) prompts with the highest agreement are kept, of equals
    the first, and of each the candidate of the highest S that gives that answer. Prompts without any are left out.
    Votes of equal candidates, which a greedy sampler makes, count each.
    """
    size = scored.rollout.batch.num_generations
    scores = scored.rewards.view(-1, size).double()
    kept = scored.scores.valid.view(-1, size) & ~scored.rollout.truncated.view(-1, size)
    votes = scores.masked_fill(~kept, -torch.inf).softmax(1)
    picks = []
    for prompt in range(len(scores)):
        rows = [i for i in range(size) if kept[prompt, i]]
        sums: dict[str, float] = {}
        answers = scored.rollout.spans.answers[prompt * size : (prompt + 1) * size]
        for i in rows:
            if answers[i] is not None:
                key = normalize_answer(answers[i])
                sums[key] = sums.get(key, 0.0) + float(votes[prompt, i])
        agreed = max(sums, key=sums.__getitem__) if sums else None
        if share < 1:
            rows = [i for i in rows if agreed is not None and answers[i] is not None
                    and normalize_answer(answers[i]) == agreed]  # fmt: skip
        if rows:
            best = max(rows, key=lambda i: float(scores[prompt, i]))
            picks.append(Pick(prompt * size + best, sums.get(agreed, 0.0)))
    most = math.ceil(share * len(scores))
    chosen = sorted(range(len(picks)), key=lambda i: -picks[i].agreement)[:most] if share < 1 else range(len(picks))
    return [picks[i] for i in sorted(chosen)]


def rejection_step(trainer: Trainer, scored: ScoredRollout, picks: Sequence[Pick], *, pad_id: int) -> StepResult:
    """One step on -log p(candidate | prompt), the mean over all tokens of the picked; NO_STEP where none is."""
    metrics = {"rejection/picked": len(picks) / len(scored.rollout.batch.prompt_ids)}
    if not picks:
        return replace(NO_STEP, metrics=metrics, note="nothing picked")
    rows = [pick.row for pick in picks]
    metrics |= {
        "rejection/agreement": sum(pick.agreement for pick in picks) / len(picks),
        "rejection/score": float(scored.rewards[rows].mean()),
        "rejection/length": float(scored.rollout.batch.lengths[rows].double().mean()),
    }
    result = sft_step(trainer, [_as_pair(scored, row) for row in rows], pad_id=pad_id)
    return replace(result, metrics=metrics)


def _as_pair(scored: ScoredRollout, row: int) -> TokenizedPair:
    """The candidate as what SFT learns, by the sampler's own ids."""
    batch = scored.rollout.batch
    prompt = row // batch.num_generations
    ids = tuple(batch.completion_ids[row][batch.completion_mask[row]].tolist())
    return TokenizedPair(tuple(batch.prompt_ids[prompt][batch.prompt_mask[prompt]].tolist()), ids, ids, None)
