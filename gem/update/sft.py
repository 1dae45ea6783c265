"""Reflective SFT: a step on chosen answers."""

from __future__ import annotations

from collections.abc import Sequence

from gem.data.batches import TokenizedPair, collate
from gem.model.forward import completion_stats
from gem.update.optimizer import StepResult, Trainer


def sft_step(
    trainer: Trainer,
    pairs: Sequence[TokenizedPair],
    *,
    pad_id: int,
    micro_batch_size: int,
    padding_free: bool = False,
) -> StepResult:
    """One step on -log p(chosen | prompt), the mean over all answer tokens of the step (end token included)."""
    num_tokens = sum(len(pair.sft_ids) for pair in pairs)
    # Pairs of like length share a micro-batch; the gradient is a sum, so the order is free.
    ordered = sorted(pairs, key=lambda pair: len(pair.prompt_ids) + len(pair.sft_ids))
    learning_rate = trainer.learning_rate
    trainer.model.train()
    for part, weight in trainer.micro_batches(ordered, micro_batch_size):
        batch = collate([p.prompt_ids for p in part], [p.sft_ids for p in part], pad_id)
        stats = completion_stats(trainer.model, batch, padding_free=padding_free)
        trainer.backward(-weight * stats.logprobs.sum() / num_tokens)
    trainer.model.eval()
    outcome = trainer.step()
    return StepResult(outcome.loss, outcome.grad_norm, learning_rate, num_tokens, len(pairs), outcome.skipped)
