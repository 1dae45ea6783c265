"""Every setting of a run: its name, type, default, meaning and range, in the order a run uses them.

Batch sizes count prompts unless the name says otherwise. `gem.config.read` reads, checks, saves and prints them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

SYSTEM_PROMPT = (
    "Solve the problem step by step, one short step per line. "
    "Then end with 'Final Answer: ' followed by the answer alone."
)
DIRECT_SYSTEM_PROMPT = "Give no reasoning. Reply with 'Final Answer: ' followed by the answer alone."


def setting(default: Any, help: str, *, section: str | None = None, **limits: float) -> Any:
    """A field of TrainConfig. limits: `least`, `most` (included), `above`, `below` (excluded)."""
    return dataclasses.field(default=default, metadata={"help": help, "section": section, "limits": limits})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of `gem train`."""

    preset: Literal["paper", "safe"] = setting(
        "paper", "what the keys not given default to: the published method, or the one with safeguards",
        section="What is trained on what, and where it goes",
    )  # fmt: skip
    model: str = setting("", "a local directory, a GGUF file (or a directory holding one), or a hub id; required")
    train_file: str = setting("", "pairs: a JSONL, JSON, CSV or Parquet file, a saved dataset, or a hub id; required")
    train_split: str = setting("train", "split of a dataset; a file has none")
    eval_file: str | None = setting(None, "held-out pairs; none: eval_fraction of train_file's prompts are held out")
    eval_split: str = setting("test", "split of a dataset")
    eval_fraction: float = setting(0.2, "share of the prompts held out where no eval_file is given", above=0, below=1)
    output_dir: str = setting("", "the run's directory; must not exist or be empty; required")
    seed: int = setting(0, "of data order, split and sampling", least=0)

    prompt_column: str = setting("prompt", "a string, or a list of chat messages", section="Rows")
    chosen_column: str = setting("chosen", "the preferred answer: a string, or chat messages")
    rejected_column: str = setting("rejected", "the other answer")
    answer_column: str = setting("answer", "the known final answer, where there is one")
    bad_rows: Literal["error", "skip"] = setting("error", "malformed or empty rows")
    duplicate_rows: Literal["skip", "keep", "error"] = setting("skip", "rows that stood there before")
    overlong_rows: Literal["error", "skip"] = setting("error", "rows that do not fit the model's context")

    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the weights", section="The model")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    attn_implementation: str = setting("auto", "auto: flash-attn where installed, else sdpa; or a name of transformers")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, a third more time")
    use_liger_kernel: bool = setting(False, "Liger's layer kernels; CUDA, needs liger-kernel")
    padding_free: bool = setting(False, "completions in one row without padding; needs flash-attn")
    use_peft: bool = setting(False, "train LoRA adapters and leave the weights as they are; needs peft")
    lora_r: int = setting(16, "rank", least=1)
    lora_alpha: int = setting(32, "the adapters count lora_alpha / lora_r", least=1)
    lora_dropout: float = setting(0.0, "of the adapters' input", least=0, below=1)
    lora_target_modules: str = setting("all-linear", "or names of modules with commas between")
    load_in_4bit: bool = setting(False, "QLoRA: weights in 4 bits under the adapters; needs bitsandbytes")

    system_prompt: str = setting(SYSTEM_PROMPT, "empty: none", section="Prompts and answers")
    chain_of_thought: bool = setting(True, "false: a system prompt that asks for the answer alone takes its place")
    answer_marker: str = setting("Final Answer:", "what stands before the final answer")
    answer_span: tuple[str, ...] = setting(
        ("marker",),
        "how it is found, tried in order: marker, boxed, answer_tag, after_think, last_sentence, last_tokens:N, "
        "regex:PATTERN",
    )
    no_answer: Literal["tail", "exclude"] = setting(
        "tail", "a completion without answer: its last fifth is the span, or it is left out of its group"
    )

    num_generations: int = setting(4, "candidates per prompt, G", section="Sampling of candidates", least=1)
    max_completion_length: int = setting(256, "tokens", least=1)
    temperature: float = setting(1.0, "of the sampler; 0: the most likely token", least=0)
    top_p: float = setting(1.0, "nucleus", above=0, most=1)
    top_k: int = setting(0, "0: off", least=0)
    min_p: float = setting(0.0, "least probability, relative to the most likely token's; 0: off", least=0, most=1)
    repetition_penalty: float = setting(1.0, "1.0: off", above=0)
    rollout_batch_size: int = setting(16, "prompts sampled together, times num_generations sequences", least=1)
    use_vllm: bool = setting(False, "sample with vLLM; needs vllm")
    vllm_mode: Literal["colocate", "server"] = setting("colocate", "in this process, or at vllm_server_url")
    vllm_server_url: str = setting("http://localhost:8000", "of a vLLM server")
    vllm_gpu_memory_utilization: float = setting(
        0.3, "share of the GPU's memory for vLLM in this process", above=0, most=1
    )

    score_temperature: float = setting(
        1.0, "of entropies and log-probs; 1.0 is the model itself, however it was sampled",
        section="Scores and advantages: S = -final_weight * H_final + fork_weight * H_fork", above=0,
    )  # fmt: skip
    final_weight: float = setting(1.0, "of H_final; 0: without it", least=0)
    fork_weight: float = setting(1.0, "lambda, of H_fork; 0: without it", least=0)
    top_m: float | int = setting(0.1, "share (0.1) or count (4) of the reasoning tokens in H_fork", above=0)
    ranking: Literal["score", "bradley_terry"] = setting("score", "reward: the score, or its Bradley-Terry strength")
    trim: Literal["none", "mad", "rank"] = setting("none", "leave outliers out of the group: by deviation or by rank")
    trim_mad: float = setting(3.0, "mad: more than so many scaled median absolute deviations from the median", above=0)
    trim_share: float = setting(0.25, "rank: this share of the group from each end", least=0, below=0.5)
    reward_mapping: Literal["identity", "softmax", "rank"] = setting("identity", "of scores within a group")
    reward_scale: Literal["none", "group"] = setting("none", "group: divide by the group's standard deviation")
    mask_truncated: bool = setting(False, "leave candidates without an end token out of their group")
    overlong_buffer: int = setting(0, "tokens before max_completion_length over which a penalty grows; 0: off", least=0)
    overlong_penalty: float = setting(1.0, "that penalty at the full length (DAPO's soft overlong punishment)", least=0)

    sft_epochs: int = setting(1, "0: no warm start", section="SFT warm start on the chosen answers", least=0)
    sft_learning_rate: float = setting(2e-5, "of AdamW", least=0)
    sft_batch_size: int = setting(8, "pairs per optimizer step", least=1)

    objective: Literal["sega", "filtered_dpo", "dpo"] = setting(
        "sega", "SEGA; DPO on the best and worst candidate; or DPO on the given pairs", section="The update"
    )
    max_steps: int = setting(10, "rollouts (batches of pairs for dpo), each with its optimizer steps; 0: none", least=0)
    prompts_per_step: int = setting(8, "prompts of a step", least=1)
    learning_rate: float = setting(1e-6, "of AdamW", least=0)
    loss_type: Literal["sum", "mean", "token", "constant"] = setting("sum", "how tokens are weighed: docs/math.md")
    num_iterations: int = setting(1, "optimizer steps on the same candidates", least=1)
    epsilon: float | None = setting(
        None, "clip the probability ratio to 1 -+ epsilon; none: no clipping", above=0, below=1
    )
    epsilon_high: float | None = setting(None, "upper end 1 + epsilon_high; none: epsilon", above=0)
    beta: float = setting(0.0, "weight of the KL divergence from the starting policy", least=0)
    dpo_beta: float = setting(0.1, "beta of DPO", above=0)

    micro_batch_size: int = setting(
        4, "prompts per forward and backward; the gradient does not depend on it", section="The optimizer", least=1
    )
    weight_decay: float = setting(0.0, "of AdamW", least=0)
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm", above=0)
    warmup_steps: int = setting(0, "of each stage", least=0)
    lr_schedule: Literal["constant", "linear"] = setting("constant", "linear falls to 0 over the stage")
    max_bad_steps: int = setting(3, "a non-finite gradient skips its step; so many in a row stop the run", least=1)

    eval_batch_size: int = setting(8, "prompts per forward or generate batch", section="Evaluation", least=1)
    eval_steps: int = setting(0, "evaluate every so many steps as well; 0: before and after each stage only", least=0)
    preference_reduction: Literal["sum", "mean"] = setting(
        "sum", "implicit reward: the answer's log-prob, or per token"
    )
    eval_generate: int = setting(64, "held-out problems answered greedily; 0: none", least=0)
    eval_sample: int = setting(16, "held-out prompts with candidates sampled and scored; 0: none", least=0)

    save_steps: int = setting(0, "a checkpoint every so many steps; 0: none", section="Checkpoints and logs", least=0)
    save_total_limit: int = setting(2, "older ones are removed", least=1)
    report_to: tuple[str, ...] = setting((), "tensorboard, trackio, wandb, beside metrics.jsonl")
    log_completions_steps: int = setting(0, "a table of sampled answers every so many steps; 0: none", least=0)

    guards: Literal["off", "warn", "lower_fork_weight", "rollback", "stop"] = setting(
        "off", "what is done when a limit below is passed: self-made rewards get hacked", section="Guards"
    )
    guard_kl: float = setting(0.5, "KL from the starting policy, nats a token", above=0)
    guard_length_ratio: float = setting(2.0, "mean completion length, times that at the start or its inverse", above=1)
    guard_repetition: float = setting(0.5, "share of fork tokens that repeat what stood before", above=0, most=1)
    guard_span_rate: float = setting(
        0.5, "least share of completions with an answer, of that at the start", above=0, most=1
    )
    guard_h_final: float = setting(0.01, "least H_final, nats", least=0)
    guard_preference_drop: float = setting(0.1, "held-out preference accuracy below its best", above=0, most=1)


# What a preset sets; keys of the file and flags stand above it. Reasons: docs/decisions-training.md.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "safe": {
        "loss_type": "token",
        "reward_scale": "group",
        "mask_truncated": True,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.02,
        "guards": "lower_fork_weight",
    },
}
CHOICES: dict[str, tuple[str, ...]] = {
    "report_to": ("tensorboard", "trackio", "wandb"),
    "answer_span": ("marker", "boxed", "answer_tag", "after_think", "last_sentence", "last_tokens:N", "regex:PATTERN"),
}
