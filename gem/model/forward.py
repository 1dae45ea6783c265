"""The one place where the model runs forward: completions -> hidden states -> token statistics or a loss.

The logits never exist: the head goes to the fused kernels, once it has been checked against the model's own logits
(before its first use on a model).

The G completions of a prompt share it, so the prompt runs once: its keys and values are repeated for the completions,
and gradients flow back through them. With prompts as long as answers and G = 4 that is 2.5 times fewer tokens. Where
that cannot be (gradient checkpointing, sharded parameters under gradients, G = 1, models with other state) prompt and
completion are joined into one row, with the same numbers. `padding_free` puts those rows into a single one, without
padding, told apart by their positions; it is for flash-attn, which then does no more than each sequence needs.

`Policy.model` may be bare, under peft, sharded by FSDP2, under DeepSpeed's ZeRO or within DistributedDataParallel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gem.config.settings import SegaUpdate
from gem.data.batches import (
    CompletionBatch,
    TokenizedPair,
    collate_pairs,
    counted_rows,
    counted_targets,
    positions,
    select_groups,
    to_device,
)
from gem.parallel import deepspeed, processes
from gem.progress import Bar, advance
from gem_kernels import (
    PolicyLossOutput,
    SegaOutput,
    TokenStats,
    fused_linear_policy_loss,
    fused_linear_sega_loss,
    linear_token_stats,
)
from gem_kernels.integrations.transformers import Head, hidden_states_and_head

Output = TypeVar("Output")

# Logits that `top_tokens` holds at once: 64 MiB in fp32.
_TOP_LOGITS = 1 << 24


@dataclass(frozen=True)
class Policy:
    """A model and how it runs forward."""

    model: nn.Module
    padding_free: bool = False

    @property
    def device(self) -> torch.device:
        return inner_model(self.model).device


def completion_stats(policy: Policy, batch: CompletionBatch, *, temperature: float = 1.0) -> TokenStats:
    """Log-prob and entropy (nats) of every completion token, [B, T] fp32, zero under the padding; differentiable."""
    known = _known_rows(policy, batch)
    return _from_hidden(policy, batch, linear_token_stats, counted_targets, temperature=temperature, rows=known)


@torch.no_grad()
def measured_stats(
    policy: Policy, batch: CompletionBatch, *, temperature: float = 1.0, batch_size: int, bar: Bar | None = None
) -> TokenStats:
    """`completion_stats` [B, T] on the CPU, without gradient, `batch_size` prompts a forward.

    With several processes each runs its share of the prompts, and all get the whole.
    """
    policy.model.eval()
    size, width = batch.num_generations, batch.completion_ids.shape[1]
    mine = processes.share(range(len(batch.prompt_ids)))
    groups: list[Tensor] = []  # [2, G, T] of each prompt
    with processes.gathered(policy.model):
        for start in range(0, len(mine), batch_size):
            part, _ = select_groups(batch, mine[start : start + batch_size])
            stats = completion_stats(policy, part, temperature=temperature)
            found = torch.stack([stats.logprobs, stats.entropy]).cpu()
            found = torch.nn.functional.pad(found, (0, width - found.shape[2]))
            groups += found.view(2, -1, size, width).unbind(1)
            advance(bar, len(part.prompt_ids))
    return TokenStats(*torch.cat(processes.gather(groups), 1).unbind(0))


@torch.no_grad()
def top_tokens(
    policy: Policy, batch: CompletionBatch, k: int, *, temperature: float = 1.0, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens in place of each completion token, likeliest first: ids [B, T, k] int64 and their
    log-probs fp32 (nats), on the CPU, zero under the padding. `batch_size` prompts a forward.

    Logits exist for `_TOP_LOGITS` numbers at a time.
    """
    policy.model.eval()
    shape = (*batch.completion_ids.shape, k)
    ids, logprobs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float32)
    for start in range(0, len(batch.prompt_ids), batch_size):
        stop = min(start + batch_size, len(batch.prompt_ids))
        part, rows = select_groups(batch, range(start, stop))
        mask = part.completion_mask
        hidden, head = completion_hidden(policy, part)
        counted = hidden[mask.to(hidden.device)]  # [N, D]
        found = []
        for chunk in counted.split(max(1, _TOP_LOGITS // len(head.weight))):
            logits = head.logits(chunk).float() / temperature
            best = logits.topk(k, dim=-1)
            found.append((best.indices.cpu(), (best.values - logits.logsumexp(-1, keepdim=True)).cpu()))
        places = rows[:, None].expand(mask.shape)[mask], torch.arange(mask.shape[1]).expand(mask.shape)[mask]
        if found:
            ids[places], logprobs[places] = (torch.cat(parts) for parts in zip(*found))
    return ids, logprobs


@torch.no_grad()
def pair_logprobs(
    policy: Policy, pairs: Sequence[TokenizedPair], *, pad_id: int, batch_size: int, bar: Bar | None = None
) -> Tensor:
    """log p(answer | prompt), end-of-turn token included, of (chosen, rejected): [N, 2] float64 on the CPU, nats.

    Without gradient. Both answers stand under the same prompt in the same batch. With several processes each runs its
    share of the pairs, and all get the whole.
    """
    policy.model.eval()
    # Pairs of like length together, so that little is padding; the log-probs return in the order of `pairs`.
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].prompt_ids), len(pairs[i].chosen_ids)))
    mine = processes.share(order)
    found: list[Tensor] = []
    with processes.gathered(policy.model):
        for start in range(0, len(mine), batch_size):
            batch = collate_pairs([pairs[i] for i in mine[start : start + batch_size]], pad_id)
            stats = completion_stats(policy, batch)
            found += stats.logprobs.double().sum(1).cpu().view(-1, 2).unbind(0)
            advance(bar, len(batch.prompt_ids))
    logprobs = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for place, row in zip(order, processes.gather(found)):
        logprobs[place] = row
    return logprobs


def completion_sega_loss(
    policy: Policy,
    batch: CompletionBatch,
    settings: SegaUpdate,
    *,
    advantages: Tensor,
    valid: Tensor,
    denominator: float,
) -> SegaOutput:
    """The SEGA loss of a micro-batch, in one shot: advantages [B] and the whole step's `denominator` are given."""
    return _from_hidden(
        policy,
        batch,
        fused_linear_sega_loss,
        lambda batch: batch.completion_ids,
        completion_mask=batch.completion_mask,
        advantages=to_device(advantages, policy.device),
        valid=to_device(valid, policy.device),
        loss_type=settings.loss_type,
        max_completion_length=settings.max_completion_length,
        denominator=denominator,
        temperature=settings.score_temperature,
    )


def completion_policy_loss(
    policy: Policy,
    batch: CompletionBatch,
    token_loss: Callable[..., Tensor],
    token_inputs: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
) -> PolicyLossOutput:
    """Any loss that is a sum over completion tokens, in one shot: gem_kernels.fused_linear_policy_loss has its terms.

    token_inputs: tensors [B, T]; they must make the loss of a token under the padding 0.
    """
    return _from_hidden(
        policy,
        batch,
        fused_linear_policy_loss,
        counted_targets,
        token_loss=token_loss,
        token_inputs={name: to_device(value, policy.device) for name, value in token_inputs.items()},
        temperature=temperature,
        rows=_known_rows(policy, batch),
    )


def _known_rows(policy: Policy, batch: CompletionBatch) -> Tensor | None:
    """The rows that count, for a device that would multiply padding too; a CPU looks for itself."""
    return None if policy.device.type == "cpu" else counted_rows(batch)


def _from_hidden(
    policy: Policy,
    batch: CompletionBatch,
    fused: Callable[..., Output],
    targets: Callable[[CompletionBatch], Tensor],
    **options: Any,
) -> Output:
    """fused(hidden states, head's weight, targets, what the head is besides, options): one forward of the model."""
    ids = to_device(targets(batch), policy.device)

    def compute() -> Output:
        hidden, head = completion_hidden(policy, batch)
        more = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
        return fused(hidden, head.weight, ids, **more, **options)

    return deepspeed.forward(policy.model, compute)


def completion_hidden(policy: Policy, batch: CompletionBatch) -> tuple[Tensor, Head]:
    """Last hidden states [B, T, D] and the head; row t predicts completion token t from all before it.

    `batch` is on the CPU: what depends on its masks is found there, without a wait for the device.
    """
    model, width, device = policy.model, batch.completion_ids.shape[1], policy.device
    prompt_ids = batch.prompt_ids.repeat_interleave(batch.num_generations, 0)
    prompt_mask = batch.prompt_mask.repeat_interleave(batch.num_generations, 0)
    # The last completion token predicts nothing that is needed.
    input_ids = torch.cat([prompt_ids, batch.completion_ids[:, :-1]], 1)
    mask = torch.cat([prompt_mask, batch.completion_mask[:, :-1]], 1)
    position_ids = positions(mask)
    if policy.padding_free:
        mask = torch.cat([prompt_mask, batch.completion_mask[:, 1:]], 1)  # less the last token of each completion
        # No attention mask: positions that begin again at 0 tell the sequences apart.
        packed = packed_lengths(model, mask.sum(1), device)
        ids, places = (to_device(x[mask][None], device) for x in (input_ids, position_ids))
        hidden, head = hidden_states_and_head(model, ids, None, places, **packed)
        rows = (mask.flatten().cumsum(0) - 1).view(mask.shape)[:, -width:]  # under the padding: any row
        return hidden[0][to_device(rows, device)], head
    shared = batch.prompt_ids.shape[1] - 1  # the prompt's last token predicts the first answer token: it stays
    cache = prompt_cache(model, batch) if can_share_prompt(model) and batch.num_generations > 1 and shared else None
    if cache is None:
        shared = 0
    keep = {"logits_to_keep": width} if keeps_logits(model) else {}
    hidden, head = hidden_states_and_head(
        model,
        to_device(input_ids[:, shared:], device),
        to_device(mask.long(), device),
        to_device(position_ids[:, shared:], device),
        past_key_values=cache,
        use_cache=cache is not None,
        **keep,
    )
    return hidden[:, -width:], head


def packed_lengths(model: nn.Module, lengths: Tensor, device: torch.device) -> dict[str, Any]:
    """What flash-attn asks of rows packed one after the other; transformers would wait for the device in every layer to
    find it. Other attention has no use for it."""
    flash = str(inner_model(model).config._attn_implementation).startswith("flash_attention")
    if not flash or "kwargs" not in _forward_arguments(model):
        return {}
    bounds = to_device(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), device)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def prompt_cache(model: nn.Module, batch: CompletionBatch) -> DynamicCache:
    """Keys and values of each prompt but its last token, repeated for its completions."""
    mask = batch.prompt_mask[:, :-1]
    model = inner_model(model)  # DistributedDataParallel counts one forward for each backward
    ids, places, attended = (
        to_device(x, model.device) for x in (batch.prompt_ids[:, :-1], positions(mask), mask.long())
    )
    output = forward(
        model,
        1,
        input_ids=ids,
        position_ids=places,
        attention_mask=attended,
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(batch.num_generations)
    return cache


def can_share_prompt(model: nn.Module) -> bool:
    """True where a plain cache of keys and values can be repeated and trained through."""
    model = inner_model(model)
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    # A sharded layer is gathered for backward when a gradient reaches its output; the prompt's comes through the cache.
    if torch.is_grad_enabled() and processes.is_sharded(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def forward(model: nn.Module, num_logits: int, **inputs: Any) -> Any:
    """model(**inputs) with logits for the last `num_logits` columns only: the head skips the prompt where it can."""
    if keeps_logits(model):
        return model(**inputs, logits_to_keep=num_logits)
    output = model(**inputs)
    output.logits = output.logits[:, -num_logits:]
    return output


def keeps_logits(model: nn.Module) -> bool:
    """Whether the causal LM within takes `logits_to_keep` as an argument of its own; wrappers pass it on."""
    return "logits_to_keep" in _forward_arguments(model)


def _forward_arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    model = inner_model(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return inspect.signature(model.forward).parameters


def inner_model(model: nn.Module) -> nn.Module:
    """The model below DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model
