"""DPO: a step on pairs of answers, given or made of the best and the worst candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gem.config.settings import DpoUpdate
from gem.data.batches import TokenizedPair, collate_pairs, to_device
from gem.model.forward import completion_stats
from gem.parallel import processes
from gem.scoring.score import ScoredRollout
from gem.update.optimizer import StepResult, Trainer


def dpo_step(
    trainer: Trainer, pairs: Sequence[TokenizedPair], ref_logprobs: Tensor, settings: DpoUpdate, *, pad_id: int
) -> StepResult:
    """One step on the mean over pairs of -log sigma(dpo_beta * ((lc - lc_ref) - (lr - lr_ref))).

    l are log-probs of whole answers, nats; ref_logprobs [N, 2] (chosen, rejected) those of the starting policy, from
    `gem.model.forward.pair_logprobs`. Source: DPO (arXiv 2305.18290), Eq. 7.
    """
    order = sorted(range(len(pairs)), key=lambda i: max(len(pairs[i].chosen_ids), len(pairs[i].rejected_ids)))
    # Rewards of chosen and rejected, pairs won, ties counting half; margins. Read once, at the step's end.
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.policy.device)

    def loss_of(members: list[int], weight: float) -> Tensor:
        batch = collate_pairs([pairs[i] for i in members], pad_id)
        logprobs = completion_stats(trainer.policy, batch).logprobs.sum(1).view(-1, 2)
        of_reference = to_device(ref_logprobs[members].to(logprobs.dtype), logprobs.device)
        rewards = settings.dpo_beta * (logprobs - of_reference)
        margins = rewards[:, 0] - rewards[:, 1]
        won = (margins.detach().sign() + 1) / 2
        sums.add_(weight * torch.stack([*rewards.detach().sum(0), won.sum(), margins.detach().sum()]).double())
        return -F.logsigmoid(margins).sum() / len(pairs)

    result = trainer.take_step(order, loss_of)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    return replace(
        result,
        num_tokens=sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs),
        num_sequences=2 * len(pairs),
        metrics={name: value / len(pairs) for name, value in zip(names, processes.sum_over_processes(sums.tolist()))},
        note=f"loss {result.loss:.3f}",
    )


def filtered_pairs(scored: ScoredRollout) -> list[TokenizedPair]:
    """The best and the worst candidate of each group that has two, as chosen and rejected, by the sampler's own ids."""
    batch = scored.rollout.batch

    def completion(row: int) -> tuple[int, ...]:
        return tuple(batch.completion_ids[row][batch.completion_mask[row]].tolist())

    pairs = []
    for best, worst in scored.pairs.tolist():
        prompt = best // batch.num_generations
        prompt_ids = tuple(batch.prompt_ids[prompt][batch.prompt_mask[prompt]].tolist())
        pairs.append(TokenizedPair(prompt_ids, completion(best), completion(worst), None))
    return pairs
