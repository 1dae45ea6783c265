"""The one place where the model runs forward: completions -> hidden states -> token statistics or the SEGA loss.

The logits never exist: the head goes to the fused kernels, once it has been checked against the model's own logits
(before its first use on a model).

The G completions of a prompt share it, so the prompt runs once: its keys and values are repeated for the completions,
and gradients flow back through them. With prompts as long as answers and G = 4 that is 2.5 times fewer tokens. Where
the model offers no such cache (gradient checkpointing, G = 1, models with other state) prompt and completion are
joined into one row, with the same numbers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gem.data import CompletionBatch
from gem_kernels import SegaOutput, TokenStats, fused_linear_sega_loss, linear_token_stats
from gem_kernels.integrations.transformers import Head, hidden_states_and_head


def completion_stats(model: PreTrainedModel, batch: CompletionBatch, *, temperature: float = 1.0) -> TokenStats:
    """Log-prob and entropy (nats) of every completion token, [B, T] fp32, zero under the padding; differentiable."""
    batch = on_device(batch, model.device)
    targets = batch.completion_ids.masked_fill(~batch.completion_mask, -100)
    hidden, head = completion_hidden(model, batch)
    return linear_token_stats(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=temperature,
    )


def completion_sega_loss(
    model: PreTrainedModel,
    batch: CompletionBatch,
    *,
    advantages: torch.Tensor,
    valid: torch.Tensor,
    denominator: float,
    loss_type: str,
    max_completion_length: int,
    temperature: float = 1.0,
) -> SegaOutput:
    """The SEGA loss of a micro-batch, in one shot: advantages [B] and the whole step's `denominator` are given."""
    batch = on_device(batch, model.device)
    hidden, head = completion_hidden(model, batch)
    return fused_linear_sega_loss(
        hidden,
        head.weight,
        batch.completion_ids,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        completion_mask=batch.completion_mask,
        advantages=advantages.to(model.device),
        valid=valid.to(model.device),
        loss_type=loss_type,
        max_completion_length=max_completion_length,
        denominator=denominator,
        temperature=temperature,
    )


def completion_hidden(model: PreTrainedModel, batch: CompletionBatch) -> tuple[torch.Tensor, Head]:
    """Last hidden states [B, T, D] and the head; row t predicts completion token t from all before it."""
    width = batch.completion_ids.shape[1]
    prompt_ids = batch.prompt_ids.repeat_interleave(batch.num_generations, 0)
    prompt_mask = batch.prompt_mask.repeat_interleave(batch.num_generations, 0)
    # The last completion token predicts nothing that is needed.
    input_ids = torch.cat([prompt_ids, batch.completion_ids[:, :-1]], 1)
    mask = torch.cat([prompt_mask, batch.completion_mask[:, :-1]], 1)
    position_ids = positions(mask)
    shared = batch.prompt_ids.shape[1] - 1  # the prompt's last token predicts the first answer token: it stays
    cache = prompt_cache(model, batch) if can_share_prompt(model) and batch.num_generations > 1 and shared else None
    if cache is None:
        shared = 0
    keep = {"logits_to_keep": width} if keeps_logits(model) else {}
    hidden, head = hidden_states_and_head(
        model,
        input_ids[:, shared:],
        mask.long(),
        position_ids[:, shared:],
        past_key_values=cache,
        use_cache=cache is not None,
        **keep,
    )
    return hidden[:, -width:], head


def prompt_cache(model: PreTrainedModel, batch: CompletionBatch) -> DynamicCache:
    """Keys and values of each prompt but its last token, repeated for its completions."""
    mask = batch.prompt_mask[:, :-1]
    output = forward(
        model,
        1,
        input_ids=batch.prompt_ids[:, :-1],
        position_ids=positions(mask),
        attention_mask=mask.long(),
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(batch.num_generations)
    return cache


def can_share_prompt(model: PreTrainedModel) -> bool:
    """True where a plain cache of keys and values can be repeated and trained through."""
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def forward(model: PreTrainedModel, num_logits: int, **inputs: Any) -> Any:
    """model(**inputs) with logits for the last `num_logits` columns only: the head skips the prompt where it can."""
    if keeps_logits(model):
        return model(**inputs, logits_to_keep=num_logits)
    output = model(**inputs)
    output.logits = output.logits[:, -num_logits:]
    return output


def keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token [R, W] from its row's mask: the first token is 0 wherever the padding ends."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def on_device(batch: CompletionBatch, device: torch.device) -> CompletionBatch:
    return CompletionBatch(
        prompt_ids=batch.prompt_ids.to(device),
        prompt_mask=batch.prompt_mask.to(device),
        completion_ids=batch.completion_ids.to(device),
        completion_mask=batch.completion_mask.to(device),
        num_generations=batch.num_generations,
    )
