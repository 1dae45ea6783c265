"""Rejection sampling: the model learns its own best candidates, those that its candidates agree on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gem.data.answers import normalize_answer
from gem.data.batches import TokenizedPair
from gem.scoring.score import ScoredRollout


@dataclass(frozen=True)
class Winner:
    """The candidate of a prompt that is learnt."""

    row: int  # of the rollout, in [0, P * G)
    agreement: float  # weighted share of the prompt's candidates that give its answer, in [0, 1]
    pair: TokenizedPair  # the prompt and the winner, by the sampler's own ids; `rejected_ids` is empty


def choose_winners(scored: ScoredRollout, share: float = 1.0) -> list[Winner]:
    """The candidates to learn, at most one a prompt, of the share of prompts whose candidates agree most.

        weight of an answer = sum of e^S over the valid candidates that give it / sum of e^S over all valid ones
        winner = the highest S among the candidates of the heaviest answer;  agreement = that answer's weight

    S is the score. Answers are compared after `normalize_answer`; a candidate that was cut off, or has no answer, gives
    none, and a prompt of which no candidate gives one is left out. Of the prompts left, the ceil(share * their number)
    with the largest agreement are kept, of equal ones the first, and returned in the order of the prompts.
    """
    batch, scores = scored.rollout.batch, scored.scores
    size = batch.num_generations
    found = []
    for prompt in range(len(batch.prompt_ids)):
        rows = [row for row in range(prompt * size, (prompt + 1) * size) if bool(scores.valid[row])]
        if best := _winner(scored, rows):
            found.append(best)
    found.sort(key=lambda winner: -winner[1])
    kept = sorted(found[: math.ceil(Fraction(repr(share)) * len(found))])
    return [Winner(row, agreement, _as_pair(scored, row)) for row, agreement in kept]


def best_of_each(scored: ScoredRollout) -> list[Winner]:
    """The valid candidate of the highest score of each prompt, with an answer or without, in the order of the prompts.

    One that was cut off teaches no end, so it is none. Of equal ones the first; a prompt without any is left out.
    """
    size, found = scored.rollout.batch.num_generations, []
    for start in range(0, len(scored.scores.score), size):
        valid = [row for row in range(start, start + size) if bool(scored.scores.valid[row])]
        ended = [row for row in valid if not bool(scored.rollout.truncated[row])]
        if ended:
            best = max(ended, key=lambda row: float(scored.scores.score[row]))
            found.append(Winner(best, _agreement_with(scored, valid, best), _as_pair(scored, best)))
    return found


def rejection_metrics(scored: ScoredRollout, winners: Sequence[Winner]) -> dict[str, float]:
    """Share of the prompts that have a winner, and what the winners are like: means of agreement, score, tokens."""
    metrics = {"rejection/picked": len(winners) / len(scored.rollout.batch.prompt_ids)}
    if not winners:
        return metrics
    rows = [winner.row for winner in winners]
    return {
        **metrics,
        "rejection/agreement": agreement_of(list(winners)),
        "rejection/score": float(scored.scores.score[rows].double().mean()),
        "rejection/length": float(scored.rollout.batch.lengths[rows].double().mean()),
    }


def _agreement_with(scored: ScoredRollout, rows: list[int], row: int) -> float:
    """Weighted share of these candidates that have ended and give the answer of `row`; 0 where it has none."""
    answers, truncated = scored.rollout.spans.answers, scored.rollout.truncated
    if answers[row] is None:
        return 0.0
    weights = scored.scores.score[rows].double().softmax(0).tolist()
    same = normalize_answer(answers[row])
    return sum(
        weight
        for i, weight in zip(rows, weights)
        if answers[i] is not None and not bool(truncated[i]) and normalize_answer(answers[i]) == same
    )


def _winner(scored: ScoredRollout, rows: list[int]) -> tuple[int, float] | None:
    """(row, agreement) of the valid candidates of one prompt."""
    if not rows:
        return None
    weights = scored.scores.score[rows].double().softmax(0).tolist()
    answers = scored.rollout.spans.answers
    votes: dict[str, float] = defaultdict(float)
    given: dict[str, list[int]] = defaultdict(list)
    for row, weight in zip(rows, weights):
        answer = answers[row]
        if answer is not None and not bool(scored.rollout.truncated[row]):
            votes[normalize_answer(answer)] += weight
            given[normalize_answer(answer)].append(row)
    if not votes:
        return None
    heaviest = max(votes, key=lambda answer: votes[answer])
    best = max(given[heaviest], key=lambda row: float(scored.scores.score[row]))
    return best, votes[heaviest]


def _as_pair(scored: ScoredRollout, row: int) -> TokenizedPair:
    batch = scored.rollout.batch
    prompt = row // batch.num_generations
    prompt_ids = batch.prompt_ids[prompt][batch.prompt_mask[prompt]]
    completion = batch.completion_ids[row][batch.completion_mask[row]]
    return TokenizedPair(tuple(prompt_ids.tolist()), tuple(completion.tolist()), (), None)


def agreement_of(winners: list[Winner]) -> float:
    """Mean agreement; NaN without winners."""
    return sum(winner.agreement for winner in winners) / len(winners) if winners else math.nan
