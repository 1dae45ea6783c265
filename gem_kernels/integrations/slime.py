"""The advantages of SEGA for slime, from the entropies of the samples' own tokens.

    --use-rollout-entropy
    --custom-advantage-function-path gem_kernels.integrations.slime.sega_advantages

Settings are those of `Sega` (settings.py), as `gem_sega` in the file of `--custom-config-path`. Importing this imports
nothing of slime.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import arguments
from ..answers import answer_start
from .settings import Sega, settings_of
from .swap import loaded


def sega_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Writes `advantages` and `returns` into slime's data: A_i on each token of the response of sample i.

        A = group_advantages(entropy_scores(entropy, ...).score, group_ids = sample_indices // n_samples_per_prompt)

    A group whose samples lie on several data-parallel ranks is put together: every rank calls this. Rewards and the
    KL penalty in them are not used.

    Args:
        args: slime's; n_samples_per_prompt, and `gem_sega`, the settings (a mapping).
        rollout_data: slime's, of this rank; a list with one entry a sample each: entropy [R] (with
            `--use-rollout-entropy`), loss_masks [R], tokens (prompt and response), response_lengths, sample_indices.

    Raises:
        ValueError: there are no entropies, a setting is unknown, or the context is split over ranks, whose parts of a
            response this does not put together.
    """
    settings = settings_of(getattr(args, "gem_sega", None), "gem_sega")
    if getattr(args, "context_parallel_size", 1) != 1:
        arguments.fail("context_parallel_size", "1 with sega_advantages", args.context_parallel_size)
    entropy = rollout_data.get("entropy")
    if entropy is None:
        arguments.fail("rollout_data['entropy']", "given: set --use-rollout-entropy", "None")
    device = entropy[0].device
    padded = pad_sequence([x.float() for x in entropy], batch_first=True)
    masks = [torch.as_tensor(x, dtype=torch.int64, device=device) for x in rollout_data["loss_masks"]]
    mask = pad_sequence(masks, batch_first=True)
    start = torch.full((len(entropy),), -1, dtype=torch.int64, device=device)
    if settings.marker is not None:
        lengths = rollout_data["response_lengths"]
        responses = [
            torch.as_tensor(x, dtype=torch.int64, device=device)[len(x) - n :]
            for x, n in zip(rollout_data["tokens"], lengths)
        ]
        start = answer_start(pad_sequence(responses, batch_first=True), settings.marker, completion_mask=mask)
    scores = settings.scores(padded, mask, start)
    groups = [int(index) // args.n_samples_per_prompt for index in rollout_data["sample_indices"]]
    advantages = _over_ranks(settings, groups, scores.score, scores.valid).to(device)
    rollout_data["advantages"] = [a.expand(x.shape[0]).clone() for a, x in zip(advantages, entropy)]
    rollout_data["returns"] = list(rollout_data["advantages"])


def _over_ranks(settings: Sega, groups: list[int], score: Tensor, valid: Tensor) -> Tensor:
    """The advantages of this rank's samples; their groups are those of all data-parallel ranks."""
    mine = (groups, score.tolist(), valid.tolist())
    every, rank = [mine], 0
    if dist.is_available() and dist.is_initialized():
        (mpu,) = loaded("megatron", "the one that slime asks for", "megatron.core.mpu")
        group = mpu.get_data_parallel_group()
        rank = dist.get_rank(group)
        every = [mine] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
    ids, scores, counted = ([x for part in every for x in part[i]] for i in range(3))
    cpu = torch.device("cpu")
    advantages = settings.advantages(
        torch.tensor(scores, dtype=torch.float32, device=cpu),
        torch.tensor(counted, dtype=torch.bool, device=cpu),
        torch.tensor(ids, dtype=torch.int64, device=cpu),
    )
    before = sum(len(part[0]) for part in every[:rank])
    return advantages[before : before + len(groups)]
