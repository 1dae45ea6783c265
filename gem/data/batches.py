"""Token ids as padded batches: P prompts with G completions each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids; all answers close with the token that ends the assistant's turn.

    `sft_ids` is what SFT learns: the chosen answer in the form the prompt asks for (`sft_target`).
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    answer: str | None
    sft_ids: tuple[int, ...] = ()  # left out: the chosen answer as it is

    def __post_init__(self) -> None:
        if not self.sft_ids:
            object.__setattr__(self, "sft_ids", self.chosen_ids)


@dataclass(frozen=True)
class CompletionBatch:
    """P prompts with G completions each, B = P * G; completions of one prompt stand together.

    prompt_ids, prompt_mask [P, L]: padded on the left. completion_ids, completion_mask [B, T]: padded on the right.
    Masks are boolean, True counts; what lies under False is never attended to, scored or trained on.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    num_generations: int

    @property
    def lengths(self) -> torch.Tensor:
        """Completion tokens of each sequence [B]."""
        return self.completion_mask.sum(1)

    def select_prompts(self, start: int, stop: int) -> CompletionBatch:
        """Prompts start .. stop-1 with their completions, less the padding they no longer need."""
        prompt_mask = self.prompt_mask[start:stop]
        rows = slice(start * self.num_generations, stop * self.num_generations)
        mask = self.completion_mask[rows]
        left = prompt_mask.shape[1] - int(prompt_mask.sum(1).max())
        width = max(1, int(mask.sum(1).max()))
        return CompletionBatch(
            prompt_ids=self.prompt_ids[start:stop, left:],
            prompt_mask=prompt_mask[:, left:],
            completion_ids=self.completion_ids[rows, :width],
            completion_mask=mask[:, :width],
            num_generations=self.num_generations,
        )


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> CompletionBatch:
    """P prompts and P * G completions as one padded batch."""
    prompt_ids, prompt_mask = pad_rows(prompts, pad_id, left=True)
    completion_ids, completion_mask = pad_rows(completions, pad_id, left=False)
    return CompletionBatch(prompt_ids, prompt_mask, completion_ids, completion_mask, len(completions) // len(prompts))


def collate_pairs(pairs: Sequence[TokenizedPair], pad_id: int) -> CompletionBatch:
    """Pairs as prompts with two completions each: chosen, rejected."""
    answers = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return collate([pair.prompt_ids for pair in pairs], answers, pad_id)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows -> (ids [R, W] int64, mask [R, W] bool)."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = True
    return ids, mask


def select_groups(batch: CompletionBatch, groups: Sequence[int]) -> tuple[CompletionBatch, Tensor]:
    """The given prompts with all their completions as a batch of their own, and the rows those come from."""
    size = batch.num_generations
    index = torch.tensor(list(groups))
    rows = (index[:, None] * size + torch.arange(size)).flatten()
    part = CompletionBatch(
        batch.prompt_ids[index], batch.prompt_mask[index], batch.completion_ids[rows], batch.completion_mask[rows], size
    )
    return part.select_prompts(0, len(index)), rows


def counted_targets(batch: CompletionBatch) -> Tensor:
    """Completion tokens [B, T], -100 under the padding."""
    return batch.completion_ids.masked_fill(~batch.completion_mask, -100)


def positions(mask: Tensor) -> Tensor:
    """Position of each token [R, W] from its row's mask: the first token is 0 wherever the padding ends."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def counted_rows(batch: CompletionBatch) -> Tensor:
    """Indices of the completion tokens among all [B * T], ascending."""
    return batch.completion_mask.flatten().nonzero().flatten()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: an accelerator fetches it from pinned memory. Batches stay on the CPU,
    where masks can be looked at, and cross here."""
    if tensor.device.type == "cpu" != device.type:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
