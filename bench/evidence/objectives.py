"""The objectives that are compared. Each begins with the SFT model; those that learn from candidates learn from one
pool, sampled by that model, so that rows differ in nothing but the objective."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.evidence.scores import as_linear, calibrated
from bench.evidence.start import Pool, Start
from gem.calibration.features import CALIBRATED
from gem.data.answers import answers_match
from gem.data.batches import TokenizedPair
from gem.model.forward import pair_logprobs
from gem.run.metrics import step_metrics
from gem.run.stages import batch_at
from gem.scoring.score import ScoredRollout
from gem.update.dpo import dpo_step, filtered_pairs
from gem.update.optimizer import StepResult, Trainer
from gem.update.rejection import Winner, choose_winners
from gem.update.sega import sega_step
from gem.update.sft import sft_step
from gem_kernels import LinearScore

SHARE = 0.5  # of the prompts, by agreement, whose winners rejection sampling learns
PASSES = 2  # over the winners
CURVE_PAIRS, CURVE_STEPS = 16, 4  # held-out pairs that are followed during training, every so many steps

Train = Callable[[Start, Pool], dict[str, Any]]


@dataclass(frozen=True)
class Objective:
    """A row of the table. `changes` are settings; `mean` names the row of the mean of the weights before and after."""

    key: str
    words: str
    train: Train
    changes: dict[str, Any] = field(default_factory=dict)
    mean: str | None = None
    mean_words: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,) if self.mean is None else (self.key, self.mean)


def sega_paper(start: Start, pool: Pool) -> dict[str, Any]:
    return sega(start, pool, None)


def sega_calibrated(start: Start, pool: Pool) -> dict[str, Any]:
    return sega(start, pool, calibrated_score(start))


def sega(start: Start, pool: Pool, linear: LinearScore | None) -> dict[str, Any]:
    """One pass over the pool, `prompts_per_step` prompts with all their candidates a step; linear None: the paper's S.

    The ratio of the clipped loss is against the SFT model, which sampled the pool. There is no KL term: of candidates
    that are not the policy's own k3 is no estimate of its KL, and one token that became improbable can rule a step.
    """
    config, prompts = start.config, list(range(len(pool.pairs)))

    def step(trainer: Trainer, part: list[int]) -> StepResult:
        scored = pool.scored(start.form, config, linear, part)
        return sega_step(trainer, scored, config)

    return run_steps(start, prompts, config.prompts_per_step, 1, step)


def filtered_dpo(start: Start, pool: Pool) -> dict[str, Any]:
    """DPO on the best and the worst candidate of each prompt by the calibrated score."""
    scored = pool.scored(start.form, start.config, calibrated_score(start))
    return dpo(start, filtered_pairs(scored), 1) | {"pairs": len(filtered_pairs(scored))}


def plain_dpo(start: Start, pool: Pool) -> dict[str, Any]:
    """DPO on the given pairs, without any candidate."""
    return dpo(start, start.data.given, PASSES)


def dpo(start: Start, pairs: Sequence[TokenizedPair], passes: int) -> dict[str, Any]:
    config, pad_id = start.config, start.form.pad_id
    reference = pair_logprobs(start.policy, pairs, pad_id=pad_id, batch_size=config.eval_batch_size)

    def step(trainer: Trainer, part: list[int]) -> StepResult:
        return dpo_step(trainer, [pairs[i] for i in part], reference[part], config, pad_id=pad_id)

    return run_steps(start, list(range(len(pairs))), config.prompts_per_step, passes, step)


def rejection(start: Start, pool: Pool) -> dict[str, Any]:
    """SFT on the model's own winners, of the half of the prompts whose candidates agree most."""
    scored = pool.scored(start.form, start.config, calibrated_score(start))
    return learn_winners(start, pool, scored, choose_winners(scored, SHARE))


def random_winners(start: Start, pool: Pool) -> dict[str, Any]:
    """The control: as many prompts and winners, both drawn by lot; all else as in `rejection`."""
    scored = pool.scored(start.form, start.config, calibrated_score(start))
    every = choose_winners(scored, 1.0)  # the prompts that have a winner at all
    number = len(choose_winners(scored, SHARE))
    draw, size = random.Random(start.config.seed), pool.num_generations
    chosen = []
    for winner in draw.sample(every, number):
        first = winner.row - winner.row % size
        row = draw.choice([row for row in range(first, first + size) if could_win(scored, row)])
        answer = TokenizedPair(winner.pair.prompt_ids, tuple(pool.completions[row]), (), None)
        chosen.append(Winner(row, winner.agreement, answer))
    return learn_winners(start, pool, scored, chosen)


def could_win(scored: ScoredRollout, row: int) -> bool:
    """Whether `choose_winners` would look at this candidate: valid, ended, with an answer."""
    rollout = scored.rollout
    return bool(scored.scores.valid[row]) and not rollout.truncated[row] and rollout.spans.answers[row] is not None


def learn_winners(start: Start, pool: Pool, scored: ScoredRollout, winners: list[Winner]) -> dict[str, Any]:
    found = learn(start, [winner.pair for winner in winners], PASSES)
    truths = [pool.pairs[winner.row // pool.num_generations].answer for winner in winners]
    answers = [scored.rollout.spans.answers[winner.row] for winner in winners]
    known = [answers_match(answer, truth) for answer, truth in zip(answers, truths) if truth is not None]
    return found | {"winners": len(winners), "winners_right": sum(known) / len(known) if known else None}


def more_sft(start: Start, pool: Pool) -> dict[str, Any]:
    """Another pass over the given pairs."""
    return learn(start, start.data.given, 1)


def learn(start: Start, pairs: Sequence[TokenizedPair], passes: int) -> dict[str, Any]:
    def step(trainer: Trainer, part: list[TokenizedPair]) -> StepResult:
        return sft_step(trainer, part, pad_id=start.form.pad_id)

    return run_steps(start, pairs, start.config.sft_batch_size, passes, step)


def run_steps(
    start: Start, items: Sequence[Any], size: int, passes: int, step: Callable[[Trainer, Any], StepResult]
) -> dict[str, Any]:
    """Seeded passes over the items; the learning curve. Without items nothing is trained."""
    config = start.config
    total = passes * -(-len(items) // size)
    if not total:
        return {"curve": []}
    trainer = Trainer(start.policy, start.accelerator, config, learning_rate=config.learning_rate, total_steps=total)
    curve = [{"step": 0, **held_out_logprob(start)}]
    for number in range(total):
        result = step(trainer, batch_at(items, size, config.seed, number))
        row = {"step": number + 1, **step_metrics(result)}
        if (number + 1) % CURVE_STEPS == 0 or number + 1 == total:
            row |= held_out_logprob(start)
        curve.append(row)
    return {"curve": curve}


def held_out_logprob(start: Start) -> dict[str, float]:
    """Mean log-prob of whole chosen answers, and by how much the rejected ones lie below, nats: the learning curve."""
    pairs = start.data.held_out[:CURVE_PAIRS]
    values = pair_logprobs(start.policy, pairs, pad_id=start.form.pad_id, batch_size=start.config.eval_batch_size)
    chosen, rejected = values.mean(0).tolist()
    return {"held_out_logprob": chosen, "held_out_margin": chosen - rejected}


def calibrated_score(start: Start) -> LinearScore:
    return as_linear(calibrated(start)[1][CALIBRATED])


_SFT = {"learning_rate": 1e-4, "lr_schedule": "linear", "sft_batch_size": 8}
OBJECTIVES = (
    Objective("sega_paper", "SEGA on the paper's S", sega_paper),
    Objective("sega_no_final", "SEGA on S without the final term", sega_paper, {"final_weight": 0.0}),
    Objective("sega_no_fork", "SEGA on S without the fork term", sega_paper, {"fork_weight": 0.0}),
    Objective("sega_calibrated", "SEGA on the calibrated score", sega_calibrated),
    Objective("sega_no_chain", "SEGA on the paper's S, no chain of thought", sega_paper, {"chain_of_thought": False}),
    Objective("filtered_dpo", "DPO on best and worst candidate by the calibrated score", filtered_dpo),
    Objective(
        "rejection", "rejection sampling", rejection, _SFT,
        "rejection_mean", "rejection sampling, mean of weights",
    ),
    Objective(
        "random", "random winners", random_winners, _SFT,
        "random_mean", "random winners, mean of weights (control)",
    ),
    Objective(
        "more_sft", "a second pass of SFT on the given pairs", more_sft, _SFT,
        "more_sft_mean", "the same, mean of weights",
    ),
    Objective("dpo", "plain DPO on the given pairs", plain_dpo),
)  # fmt: skip
