"""Optimizer steps: reflective SFT on chosen answers, and SEGA on scored candidates.

A step is a fixed set of sequences; micro-batches only bound memory. Each loss is divided by the count of the whole
step, so the gradient is the same for 1 x 8 and 4 x 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gem.data import CompletionBatch, TokenizedPair, collate
from gem.filtering import ScoredRollout
from gem.policy import completion_sega_loss, completion_stats
from gem.trainer import Trainer


@dataclass(frozen=True)
class SegaUpdate:
    """How a scored rollout becomes a gradient (gem_kernels.sega_loss has the formula)."""

    loss_type: str = "sum"
    max_completion_length: int = 256
    temperature: float = 1.0
    micro_batch_size: int = 4  # prompts


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did. grad_norm is the norm before clipping, num_tokens what the gradient was made of."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_sequences: int
    skipped: bool = False  # the loss or the gradient was not finite: no step was taken


def sft_step(trainer: Trainer, pairs: Sequence[TokenizedPair], *, pad_id: int, micro_batch_size: int) -> StepResult:
    """One step on -log p(chosen | prompt), the mean over all answer tokens of the step (end token included)."""
    num_tokens = sum(len(pair.chosen_ids) for pair in pairs)
    # Pairs of like length share a micro-batch; the gradient is a sum, so the order is free.
    ordered = sorted(pairs, key=lambda pair: len(pair.prompt_ids) + len(pair.chosen_ids))
    learning_rate = trainer.learning_rate
    trainer.model.train()
    for part, weight in trainer.micro_batches(ordered, micro_batch_size):
        batch = collate([p.prompt_ids for p in part], [p.chosen_ids for p in part], pad_id)
        trainer.backward(-weight * completion_stats(trainer.model, batch).logprobs.sum() / num_tokens)
    trainer.model.eval()
    outcome = trainer.step()
    return StepResult(outcome.loss, outcome.grad_norm, learning_rate, num_tokens, len(pairs), outcome.skipped)


def sega_step(trainer: Trainer, scored: ScoredRollout, update: SegaUpdate) -> StepResult | None:
    """One step on the SEGA loss of all candidates; None, and no step, where every advantage is zero.

    Groups whose advantages are all zero add nothing to the gradient and are not run; they stay in the denominator.
    """
    batch = scored.rollout.batch
    kept = groups_with_gradient(scored)
    if not kept:
        return None
    denominator = sega_denominator(
        scored.scores.valid, batch.lengths, update.loss_type, max_completion_length=update.max_completion_length
    )
    learning_rate = trainer.learning_rate
    trainer.model.train()
    for groups, weight in trainer.micro_batches(kept, update.micro_batch_size):
        part, rows = select_groups(batch, groups)
        output = completion_sega_loss(
            trainer.model,
            part,
            advantages=scored.advantages[rows],
            valid=scored.scores.valid[rows],
            denominator=denominator,
            loss_type=update.loss_type,
            max_completion_length=update.max_completion_length,
            temperature=update.temperature,
        )
        trainer.backward(weight * output.loss)
    trainer.model.eval()
    outcome = trainer.step()
    num_tokens = int(select_groups(batch, kept)[0].lengths.sum())
    num_sequences = len(kept) * batch.num_generations
    return StepResult(outcome.loss, outcome.grad_norm, learning_rate, num_tokens, num_sequences, outcome.skipped)


def groups_with_gradient(scored: ScoredRollout) -> list[int]:
    """The prompts of which some candidate has an advantage that is not zero."""
    advantages = scored.advantages.view(-1, scored.rollout.batch.num_generations)
    return (advantages != 0).any(1).nonzero().flatten().tolist()


def select_groups(batch: CompletionBatch, groups: Sequence[int]) -> tuple[CompletionBatch, torch.Tensor]:
    """The given prompts with all their completions as a batch of their own, and the rows those come from."""
    size = batch.num_generations
    index = torch.tensor(groups)
    rows = (index[:, None] * size + torch.arange(size)).flatten()
    part = CompletionBatch(
        batch.prompt_ids[index], batch.prompt_mask[index], batch.completion_ids[rows], batch.completion_mask[rows], size
    )
    return part.select_prompts(0, len(groups)), rows


def sega_denominator(
    valid: torch.Tensor, lengths: torch.Tensor, loss_type: str, *, max_completion_length: int
) -> float:
    """Z of the SEGA loss over a whole step: valid sequences, their tokens, or sequences * max_completion_length."""
    if loss_type == "token":
        return float(lengths[valid].sum())
    sequences = float(valid.sum())
    return sequences * max_completion_length if loss_type == "constant" else sequences
