"""Every setting of a run: its name, type, default, meaning and range, in the order a run uses them.

A stage takes the section it needs, and TrainConfig is all of them: it is a Sampling and a Scoring and so on. A section
can be made alone too, as in Sampling(num_generations=1, temperature=0.0). Batch sizes count prompts unless the name
says otherwise. read.py reads, saves and prints them; section.py checks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import model_validator
from typing_extensions import Self

from gem.config.section import Section, setting
from gem.errors import UserError, path_of

SYSTEM_PROMPT = (
    "Solve the problem step by step, one short step per line. "
    "Then end with 'Final Answer: ' followed by the answer alone."
)
DIRECT_SYSTEM_PROMPT = "Give no reasoning. Reply with 'Final Answer: ' followed by the answer alone."

# Features that a calibrated score is made of: more of them overfit at 16 pairs; the entropies alone say little.
SCORE_FEATURES = ("final_entropy", "fork_entropy", "mean_entropy", "mean_logprob")

# Settings that several sections need.
Seed = Annotated[int, setting(0, "of data order, split and sampling", ge=0, le=2**32 - 1)]
MaxCompletionLength = Annotated[int, setting(256, "tokens", ge=1)]
NoAnswer = Annotated[
    Literal["tail", "exclude"],
    setting("tail", "a completion without answer: its last fifth is the span, or it is left out of its group"),
]
ScoreTemperature = Annotated[
    float,
    setting(
        1.0, "of entropies and log-probs; 1.0 is the model itself, however it was sampled",
        section="Scores and advantages: S = -final_weight * H_final + fork_weight * H_fork", gt=0,
    ),
]  # fmt: skip
DpoBeta = Annotated[float, setting(0.1, "beta of DPO", gt=0)]


class RunSettings(Section):
    """What is trained on what, and where it goes."""

    preset: Literal["paper", "safe"] = setting(
        "paper", "what the keys not given default to: the published method, or the one with safeguards",
        section="What is trained on what, and where it goes",
    )  # fmt: skip
    model: str = setting("", "a local directory, a GGUF file (or a directory holding one), or a hub id; required")
    train_file: str = setting("", "pairs: a JSONL, JSON, CSV or Parquet file, a saved dataset, or a hub id; required")
    train_split: str = setting("train", "split of a dataset; a file has none")
    prompts_file: str | None = setting(
        None, "more prompts, which need no answers: candidates are sampled for these; none: for train_file's"
    )
    eval_file: str | None = setting(None, "held-out pairs; none: eval_fraction of train_file's prompts are held out")
    eval_split: str = setting("test", "split of a dataset")
    eval_fraction: float = setting(0.2, "share of the prompts held out where no eval_file is given", gt=0, lt=1)
    output_dir: str = setting("", "the run's directory; must not exist or be empty; required")
    seed: Seed


class RowSettings(Section):
    """How rows are read: their columns, and what is done about those that cannot be used."""

    prompt_column: str = setting("prompt", "a string, or a list of chat messages", section="Rows")
    chosen_column: str = setting("chosen", "the preferred answer: a string, or chat messages")
    rejected_column: str = setting("rejected", "the other answer")
    answer_column: str = setting("answer", "the known final answer, where there is one")
    bad_rows: Literal["error", "skip"] = setting("error", "malformed or empty rows")
    duplicate_rows: Literal["skip", "keep", "error"] = setting("skip", "rows that stood there before")
    overlong_rows: Literal["error", "skip"] = setting("error", "rows that do not fit the model's context")

    def how_to_skip(self, kinds: Iterable[str]) -> str:
        """What leaves rows of these kinds out, in the words of a message."""
        return f"set {', '.join(f'{kind}_rows: skip' for kind in kinds)}"


class ModelSettings(Section):
    """How the model is loaded and run."""

    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the weights", section="The model")
    device: str = setting("auto", "auto, cpu, cuda, ...")
    attn_implementation: str = setting("auto", "auto: flash-attn where installed, else sdpa; or a name of transformers")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, a third more time")
    use_liger_kernel: bool = setting(False, "Liger's layer kernels; CUDA, needs liger-kernel")
    padding_free: bool = setting(False, "completions in one row without padding; needs flash-attn")


class Lora(Section):
    """Adapters: W + (lora_alpha / lora_r) B A on every target, B = 0 at first."""

    use_peft: bool = setting(False, "train LoRA adapters and leave the weights as they are; needs peft")
    lora_r: int = setting(16, "rank", ge=1)
    lora_alpha: int = setting(32, "the adapters count lora_alpha / lora_r", ge=1)
    lora_dropout: float = setting(0.0, "of the adapters' input", ge=0, lt=1)
    lora_target_modules: str = setting("all-linear", "or names of modules with commas between")
    load_in_4bit: bool = setting(False, "QLoRA: weights in 4 bits under the adapters; needs bitsandbytes")

    @model_validator(mode="after")
    def _weights_can_be_trained(self) -> Self:
        if self.load_in_4bit and not self.use_peft:
            raise UserError("config: load_in_4bit: 4-bit weights cannot be trained; set use_peft: true with it")
        return self


class TextSettings(Section):
    """The form of prompts, and how the final answer is found."""

    system_prompt: str = setting(SYSTEM_PROMPT, "empty: none", section="Prompts and answers")
    chain_of_thought: bool = setting(True, "false: a system prompt that asks for the answer alone takes its place")
    answer_marker: str = setting("Final Answer:", "what stands before the final answer")
    answer_span: tuple[str, ...] = setting(
        ("marker",),
        "how it is found, tried in order: marker, boxed, answer_tag, after_think, last_sentence, last_tokens:N, "
        "regex:PATTERN",
    )
    no_answer: NoAnswer

    @model_validator(mode="after")
    def _answers_can_be_found(self) -> Self:
        self.refuse_empty("answer_marker", "answer_span")
        if not self.chain_of_thought and "marker" not in self.answer_span:
            raise UserError(
                "config: answer_span: expected marker among them: with chain_of_thought: false answers are marked"
            )
        return self


class Sampling(Section):
    """How tokens are drawn; the defaults of the last four filter nothing."""

    num_generations: int = setting(4, "candidates per prompt, G", section="Sampling of candidates", ge=1)
    max_completion_length: MaxCompletionLength
    temperature: float = setting(1.0, "of the sampler; 0: the most likely token", ge=0)
    top_p: float = setting(1.0, "nucleus", gt=0, le=1)
    top_k: int = setting(0, "0: off", ge=0)
    min_p: float = setting(0.0, "least probability, relative to the most likely token's; 0: off", ge=0, le=1)
    repetition_penalty: float = setting(1.0, "1.0: off", gt=0)


class RolloutSettings(Section):
    """Which engine samples."""

    rollout_batch_size: int = setting(16, "prompts sampled together, times num_generations sequences", ge=1)
    use_vllm: bool = setting(False, "sample with vLLM; needs vllm")
    vllm_mode: Literal["colocate", "server"] = setting("colocate", "in this process, or at vllm_server_url")
    vllm_server_url: str = setting("http://localhost:8000", "of a vLLM server; its key is read from VLLM_API_KEY")
    vllm_gpu_memory_utilization: float = setting(0.3, "share of the GPU's memory for vLLM in this process", gt=0, le=1)

    @model_validator(mode="after")
    def _server_has_an_address(self) -> Self:
        """Its text is not repeated: it may hold a password."""
        expected = "config: vllm_server_url: expected http://HOST:PORT"
        try:
            url = urlsplit(self.vllm_server_url)
            named = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            named = False
        if not named or re.search(r"[\s\0-\x1f\x7f-\U0010ffff]", self.vllm_server_url):
            raise UserError(f"{expected}, in ASCII without spaces")
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise UserError(f"{expected} alone; a key goes into the environment as VLLM_API_KEY, never into a file")
        return self


class Scoring(Section):
    """S = -final_weight * H_final + fork_weight * H_fork, and how scores become advantages."""

    score_temperature: ScoreTemperature
    final_weight: float = setting(1.0, "of H_final; 0: without it", ge=0)
    fork_weight: float = setting(1.0, "lambda, of H_fork; 0: without it; it may be negative", ge=-1000, le=1000)
    top_m: float | int = setting(0.1, "share (0.1) or count (4) of the reasoning tokens in H_fork", gt=0)
    ranking: Literal["score", "bradley_terry"] = setting("score", "reward: the score, or its Bradley-Terry strength")
    trim: Literal["none", "mad", "rank"] = setting("none", "leave outliers out of the group: by deviation or by rank")
    trim_mad: float = setting(3.0, "mad: more than so many scaled median absolute deviations from the median", gt=0)
    trim_share: float = setting(0.25, "rank: this share of the group from each end", ge=0, lt=0.5)
    reward_mapping: Literal["identity", "softmax", "rank"] = setting("identity", "of scores within a group")
    reward_scale: Literal["none", "group"] = setting("none", "group: divide by the group's standard deviation")
    mask_truncated: bool = setting(False, "leave candidates without an end token out of their group")
    overlong_buffer: int = setting(0, "tokens before max_completion_length over which a penalty grows; 0: off", ge=0)
    overlong_penalty: float = setting(1.0, "that penalty at the full length (DAPO's soft overlong punishment)", ge=0)
    no_answer: NoAnswer
    max_completion_length: MaxCompletionLength

    @model_validator(mode="after")
    def _scores_fit(self) -> Self:
        if isinstance(self.top_m, float) and self.top_m > 1:
            raise UserError(f"config: top_m: expected a share up to 1.0 or a whole count, got {self.top_m}")
        if self.overlong_buffer > self.max_completion_length:
            raise UserError(
                f"config: overlong_buffer: expected at most max_completion_length ({self.max_completion_length}), "
                f"got {self.overlong_buffer}"
            )
        return self


class CalibrationSettings(Section):
    """Which score the objective trains on, and what is asked of it before."""

    score: str = setting(
        "paper", "paper: S as above; calibrated: fitted to the given pairs after SFT; or the path of a score.json",
        section="Which score is trained on, and its test on the given pairs before the objective",
    )  # fmt: skip
    score_features: tuple[str, ...] = setting(SCORE_FEATURES, "calibrated: the features that the score is made of")
    calibration_pairs: int = setting(48, "at most so many pairs of train_file, drawn by the seed", ge=2)
    calibration_generations: int = setting(
        4, "calibrated: candidates of each prompt with a known answer, else of 16, for fit and scales; 0: none", ge=0
    )
    calibrate_on: Literal["auto", "pairs", "candidates"] = setting(
        "auto", "calibrated: fitted to the given pairs; to right and wrong candidates of their prompts; or, auto, to "
        "these unless the pairs are clearly better"
    )  # fmt: skip
    recalibrate_steps: int = setting(0, "calibrated: fitted again every so many steps of the objective; 0: once", ge=0)
    gate: Literal["stop", "warn", "off"] = setting(
        "warn", "of a score that the pairs do not show to be informative: the run ends after SFT, or a line says so"
    )
    keep_best: bool = setting(False, "save the weights from before the objective where held-out accuracy fell with it")

    @model_validator(mode="after")
    def _score_is_named(self) -> Self:
        self.refuse_empty("score", "score_features")
        if self.calibration_generations == 1:
            raise UserError("config: calibration_generations: expected 0, or at least 2 to compare, got 1")
        if self.calibrate_on == "candidates" and not self.calibration_generations:
            raise UserError("config: calibrate_on: candidates needs calibration_generations of at least 2, got 0")
        if len(set(self.score_features)) < len(self.score_features):
            raise UserError(f"config: score_features: a name is given twice in {', '.join(self.score_features)}")
        if self.recalibrate_steps and self.score != "calibrated":
            raise UserError(
                f"config: recalibrate_steps: expected score: calibrated with it, got {self.score!r}; set it to 0"
            )
        return self


class SftSettings(Section):
    """The warm start."""

    sft_epochs: int = setting(1, "0: no warm start", section="SFT warm start on the chosen answers", ge=0)
    sft_learning_rate: float = setting(2e-5, "of AdamW", ge=0)
    sft_batch_size: int = setting(8, "pairs per optimizer step", ge=1)


class UpdateSettings(Section):
    """What a step of the objective is."""

    objective: Literal["sega", "filtered_dpo", "dpo", "rejection_sampling"] = setting(
        "sega", "SEGA; DPO on the best and worst candidate; DPO on the given pairs; or SFT on the best candidate",
        section="The update",
    )  # fmt: skip
    rejection_share: float = setting(
        1.0, "rejection_sampling: below 1.0, this share of the prompts, those whose candidates agree most", gt=0, le=1
    )
    rejection_epochs: int = setting(2, "rejection_sampling: passes over the chosen candidates", ge=1)
    start_weight: float = setting(
        0.0, "at the end the weights are the mean with those before the objective, which count so much", ge=0, le=1
    )
    max_steps: int = setting(10, "rollouts (batches of pairs for dpo), each with its optimizer steps; 0: none", ge=0)
    prompts_per_step: int = setting(8, "prompts of a step", ge=1)
    learning_rate: float = setting(1e-6, "of AdamW", ge=0)


class SegaUpdate(Section):
    """How a scored rollout becomes gradients.

    With one iteration, no clipping and no KL term the loss of a token is -A logprob (gem_kernels.sega_loss); otherwise

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k3,    r = exp(logprob - logprob when it was sampled)
        k3 = exp(d) - d - 1,    d = logprob of the starting policy - logprob

    (PPO's clipped surrogate, arXiv 1707.06347, Eq. 7, two-sided as in DAPO, arXiv 2503.14476, Eq. 8; k3 as in GRPO,
    arXiv 2402.03300, Eq. 4). Tokens are weighed and summed as `loss_type` says. Where r = 1 the two have one gradient.
    """

    loss_type: Literal["sum", "mean", "token", "constant"] = setting("sum", "how tokens are weighed: docs/math.md")
    num_iterations: int = setting(1, "optimizer steps on the same candidates", ge=1)
    epsilon: float | None = setting(None, "clip the probability ratio to 1 -+ epsilon; none: no clipping", gt=0, lt=1)
    epsilon_high: float | None = setting(None, "upper end 1 + epsilon_high; none: epsilon", gt=0)
    beta: float = setting(0.0, "weight of the KL divergence from the starting policy", ge=0)
    max_completion_length: MaxCompletionLength
    score_temperature: ScoreTemperature

    @property
    def is_plain(self) -> bool:
        return self.num_iterations == 1 and self.epsilon is None and self.beta == 0

    @model_validator(mode="after")
    def _epsilon_is_there(self) -> Self:
        if self.epsilon_high is not None and self.epsilon is None:
            raise UserError("config: epsilon_high: expected epsilon with it, got none; set epsilon, or leave both out")
        return self


class DpoUpdate(Section):
    """DPO."""

    dpo_beta: DpoBeta


class OptimizerSettings(Section):
    """AdamW and how a step is cut into parts."""

    micro_batch_size: int = setting(
        4, "prompts per forward and backward; the gradient does not depend on it", section="The optimizer", ge=1
    )
    weight_decay: float = setting(0.0, "of AdamW", ge=0)
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm", gt=0)
    warmup_steps: int = setting(0, "of each stage", ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "linear and cosine (half a period) fall to 0 over the stage"
    )
    max_bad_steps: int = setting(3, "a non-finite gradient skips its step; so many in a row stop the run", ge=1)
    max_empty_steps: int = setting(
        3, "a step of whose candidates none counts (all cut off, say) is skipped; so many in a row stop the run", ge=1
    )


class EvaluationSettings(Section):
    """What is measured on held-out pairs."""

    eval_batch_size: int = setting(8, "prompts per forward or generate batch", section="Evaluation", ge=1)
    eval_steps: int = setting(0, "evaluate every so many steps as well; 0: before and after each stage only", ge=0)
    eval_on_start: bool = setting(
        True, "answers are sampled before the first stage too; false: only pairs are measured"
    )
    preference_reduction: Literal["sum", "mean"] = setting(
        "sum", "implicit reward: the answer's log-prob, or per token"
    )
    eval_generate: int = setting(64, "held-out problems answered greedily; 0: none", ge=0)
    eval_sample: int = setting(16, "held-out prompts with candidates sampled and scored; 0: none", ge=0)
    dpo_beta: DpoBeta
    seed: Seed


class LogSettings(Section):
    """Checkpoints and logs."""

    save_minutes: float = setting(
        10.0, "a checkpoint after the first step that ends so long after the last one; 0: none",
        section="Checkpoints and logs", ge=0,
    )  # fmt: skip
    save_steps: int = setting(0, "a checkpoint every so many steps, and at the end of each stage; 0: none", ge=0)
    save_total_limit: int = setting(2, "older ones are removed", ge=1)
    report_to: tuple[str, ...] = setting((), "tensorboard, trackio, wandb, beside metrics.jsonl; or none")
    log_completions_steps: int = setting(0, "a table of sampled answers every so many steps; 0: none", ge=0)


class GuardSettings(Section):
    """The limits that show a hacked reward, and what is done when one is passed."""

    guards: Literal["off", "warn", "lower_fork_weight", "rollback", "stop"] = setting(
        "off", "what is done when a limit below is passed: self-made rewards get hacked", section="Guards"
    )
    guard_kl: float = setting(0.5, "KL from the starting policy, nats a token", gt=0)
    guard_length_ratio: float = setting(2.0, "mean completion length, times that at the start or its inverse", gt=1)
    guard_repetition: float = setting(0.5, "share of fork tokens that repeat what stood before", gt=0, le=1)
    guard_span_rate: float = setting(0.5, "least share of completions with an answer, of that at the start", gt=0, le=1)
    guard_h_final: float = setting(0.01, "least H_final, nats", ge=0)
    guard_preference_drop: float = setting(0.1, "held-out preference accuracy below its best", gt=0, le=1)
    guard_score_drop: float = setting(0.1, "held-out pair accuracy of the score below its best", gt=0, le=1)


# The last section first: the fields of the last base come first.
class TrainConfig(
    GuardSettings, LogSettings, EvaluationSettings, OptimizerSettings, DpoUpdate, SegaUpdate, UpdateSettings,
    SftSettings, CalibrationSettings, Scoring, RolloutSettings, Sampling, TextSettings, Lora, ModelSettings,
    RowSettings, RunSettings,
):  # fmt: skip
    """All settings of `gem train`."""

    @model_validator(mode="after")
    def _run_is_possible(self) -> Self:
        self.refuse_empty("model", "train_file", "output_dir")
        for key in ("model", "train_file", "prompts_file", "eval_file", "output_dir", "score"):
            if (name := getattr(self, key)) is not None:
                path_of(name, f"config: {key}")
        if self.max_steps > 0 and self.objective != "dpo" and self.num_generations < 2:
            raise UserError(f"config: num_generations: expected at least 2 to compare, got {self.num_generations}")
        if self.guards == "lower_fork_weight" and self.score != "paper":
            raise UserError(
                f"config: guards: lower_fork_weight changes the paper's score alone, got score: {self.score!r}; "
                "set guards: stop, rollback or warn"
            )
        return self

    @property
    def uses_score(self) -> bool:
        """True where an objective trains on a score of candidates."""
        return self.max_steps > 0 and self.objective != "dpo"


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
        "guards": "stop",
        "score": "calibrated",
        "gate": "stop",
        "keep_best": True,
        "objective": "rejection_sampling",
        "num_generations": 8,
        "rejection_share": 0.5,
        "start_weight": 0.5,
        "learning_rate": 2e-5,
        "lr_schedule": "linear",
    },
}
