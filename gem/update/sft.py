"""Reflective SFT: a step on chosen answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from gem.data.batches import TokenizedPair, collate
from gem.model.forward import completion_policy_loss
from gem.update.optimizer import StepResult, Trainer


def sft_step(trainer: Trainer, pairs: Sequence[TokenizedPair], *, pad_id: int) -> StepResult:
    """One step on -log p(chosen | prompt), the mean over all answer tokens of the step (end token included)."""
    num_tokens = sum(len(pair.sft_ids) for pair in pairs)

    def loss_of(part: list[TokenizedPair], weight: float) -> Tensor:
        batch = collate([p.prompt_ids for p in part], [p.sft_ids for p in part], pad_id)
        weights = batch.completion_mask.float() / num_tokens
        return completion_policy_loss(trainer.policy, batch, weighted_nll, {"weights": weights}).loss

    # Pairs of like length share a micro-batch; the gradient is a sum, so the order is free.
    ordered = sorted(pairs, key=lambda pair: len(pair.prompt_ids) + len(pair.sft_ids))
    result = trainer.take_step(ordered, loss_of)
    return replace(result, num_tokens=num_tokens, num_sequences=len(pairs), note=f"loss {result.loss:.3f}")


def weighted_nll(logprobs: Tensor, entropy: Tensor, weights: Tensor) -> Tensor:
    """-sum over tokens of weights * logprob, all [n]."""
    return -(weights * logprobs).sum()
