"""`gem train --dry-run`: everything that is checked before the first step, but the weights; nothing is written.

Bytes and products are counted from the model's configuration and the rows; the speed of products and of memory is
measured here, in a moment. Both are least figures: activations and attention are left out, and no engine reaches the
speed of a bare product.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from gem.checkpoint.folder import check_run_directory
from gem.config.settings import TrainConfig
from gem.model.load import find_attention, find_device
from gem.model.lora import add_lora
from gem.run.session import Inputs, read_inputs
from gem.terminal.console import print_result

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: numbers of parameters, tokens by phase, least bytes and seconds."""

    parameters: int
    trained: int
    sft_tokens: int  # passed through forward and backward
    sampled_tokens: int  # at most: answers end earlier
    decoded_steps: int  # forwards of one token that sampling takes, one after the other
    update_tokens: int  # of the objective
    bytes_by_part: dict[str, int]
    seconds_by_part: dict[str, float]


def dry_run(config: TrainConfig, console: Console) -> Plan:
    """All checks of a new run but its weights'; prints what the run would be."""
    check_run_directory(config.output_dir)
    inputs = read_inputs(config, console)
    device = find_device(config.device)
    find_attention(config.attn_implementation, config.dtype, device)
    made = plan(config, inputs, measured_speed(device, config.dtype))
    for line in plan_lines(config, inputs, made, device):
        print_result(console, line)
    return made


def plan(config: TrainConfig, inputs: Inputs, speed: tuple[float, float]) -> Plan:
    """speed: (products a second, in floating-point operations; bytes of weights a second)."""
    parameters, trained = parameter_counts(config, inputs)
    lengths = [len(pair.prompt_ids) + len(pair.sft_ids) for pair in inputs.train_pairs]
    sft_tokens = config.sft_epochs * sum(lengths)
    prompts, size = len(inputs.prompts), config.num_generations
    prompt_tokens = sum(len(pair.prompt_ids) for pair in inputs.prompts) // max(1, prompts)
    samples, updates = 0, 0
    if config.max_steps and config.objective == "dpo":
        both = [2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in inputs.train_pairs]
        updates = config.max_steps * config.prompts_per_step * sum(both) // max(1, len(both))
    elif config.max_steps and config.objective == "rejection_sampling":
        samples = prompts
        chosen = config.rejection_epochs * max(1, round(config.rejection_share * prompts))
        updates = chosen * (prompt_tokens + config.max_completion_length)
    elif config.max_steps:
        samples = config.max_steps * min(config.prompts_per_step, prompts)
        updates = config.num_iterations * samples * (prompt_tokens + size * config.max_completion_length)
    evaluated = (2 + (config.max_steps > 0)) * (
        min(config.eval_generate, len(inputs.eval_pairs)) + size * min(config.eval_sample, len(inputs.eval_pairs))
    )
    sampled = (samples * size + evaluated) * config.max_completion_length
    rounds = -(-samples // max(1, config.rollout_batch_size)) + -(-evaluated // max(1, config.eval_batch_size * size))
    decoded = rounds * config.max_completion_length
    width = 2 if config.dtype == "bfloat16" else 4
    weights = parameters * (0.5 if config.load_in_4bit else width)
    reference = config.beta > 0 or config.objective in ("dpo", "filtered_dpo") or config.start_weight > 0
    flops, bandwidth = speed
    return Plan(
        parameters=parameters,
        trained=trained,
        sft_tokens=sft_tokens,
        sampled_tokens=sampled,
        decoded_steps=decoded,
        update_tokens=updates,
        bytes_by_part={
            "weights": int(weights),
            "gradients": trained * (width if not config.use_peft else 4),
            "AdamW": trained * (8 if config.use_peft or config.dtype == "float32" else 12),  # and a master copy
            "starting policy": trained * width * bool(reference and not config.use_peft),
            "keys and values": kv_bytes(inputs, width) * min(config.rollout_batch_size, max(1, prompts)) * size
            * (prompt_tokens + config.max_completion_length) * bool(samples or evaluated),
        },
        seconds_by_part={
            "SFT": 6 * parameters * sft_tokens / flops,
            "sampling": max(2 * parameters * sampled / flops, decoded * weights / bandwidth),
            "objective": 6 * parameters * updates / flops,
        },
    )  # fmt: skip


def parameter_counts(config: TrainConfig, inputs: Inputs) -> tuple[int, int]:
    """(all, those that are trained) of the model, made without its numbers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(inputs.model_config, trust_remote_code=False)
        model.tie_weights()
        parameters = sum(p.numel() for p in model.parameters())
        if not config.use_peft:
            return parameters, parameters
        adapted: nn.Module = add_lora(model, config)
    return parameters, sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def kv_bytes(inputs: Inputs, width: int) -> int:
    """Of one token: keys and values of every layer."""
    text = inputs.model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * width


def measured_speed(device: str, dtype: str) -> tuple[float, float]:
    """(floating-point operations a second of a product, bytes a second that a sum reads), here and now."""
    kind = getattr(torch, dtype)
    a = torch.ones(1024, 1024, dtype=kind, device=device)
    big = torch.ones(1 << 24, dtype=torch.float32, device=device)

    def seconds(work) -> float:
        work()
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            float(work().flatten()[0])  # which waits for a GPU
            best = min(best, time.perf_counter() - start)
        return best

    return 2 * 1024**3 / seconds(lambda: a @ a), big.numel() * 4 / seconds(lambda: big.sum())


def plan_lines(config: TrainConfig, inputs: Inputs, made: Plan, device: str) -> list[str]:
    total = sum(made.bytes_by_part.values())
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in made.bytes_by_part.items() if size)
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in made.seconds_by_part.items() if seconds)
    share = "" if made.trained == made.parameters else f", {made.trained:,} of them trained"
    return [
        f"Model: {made.parameters:,} parameters{share}; {config.dtype} on {device}",
        f"Rows: {len(inputs.train_pairs)} pairs to train on, {len(inputs.eval_pairs)} held out, "
        f"{len(inputs.prompts)} prompts to sample for",
        f"Tokens: SFT {made.sft_tokens:,}; sampled at most {made.sampled_tokens:,}; objective {made.update_tokens:,}",
        f"Memory: at least {total / GIB:.2f} GiB ({parts}), and activations",
        f"Time: at least {duration(sum(made.seconds_by_part.values()))} ({times}), by the speed of products here",
        f"Dry run: every check but the weights' passed; nothing was written to {config.output_dir}",
    ]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
