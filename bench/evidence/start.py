"""Where every objective of a seed starts: the SFT model, and the pool of its own candidates."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from bench.evidence.data import TaskData, load_task
from gem.config.read import build_config
from gem.config.settings import TrainConfig
from gem.data.batches import TokenizedPair
from gem.data.prompts import TextFormat, text_format
from gem.loop import train
from gem.model.forward import Policy
from gem.model.load import end_token_ids, load_model_config, load_model_for_training, load_tokenizer
from gem.model.source import find_model
from gem.parallel import processes
from gem.rollout.sample import given_completions, roll_out
from gem.scoring.score import ScoredRollout, rank_candidates
from gem_kernels import LinearScore

POOL_STEP, GIVEN_STEP = 1, 2  # of the sampler's random keys: these draws are not those of any evaluation
# Of every row but those that say otherwise: one update for all scores, so that only the score differs. Not tuned.
SETTINGS: dict[str, Any] = {
    "rollout_batch_size": 16, "mask_truncated": True,
    "sft_epochs": 1, "sft_batch_size": 4, "sft_learning_rate": 1e-4, "max_steps": 0,
    "prompts_per_step": 8, "learning_rate": 3e-5, "micro_batch_size": 4,
    "reward_scale": "group", "loss_type": "token", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0,
    "eval_batch_size": 8, "eval_generate": 0, "eval_sample": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """G candidates of each prompt as the SFT model sampled them, with log-prob and entropy of every token."""

    pairs: list[TokenizedPair]
    completions: list[list[int]]  # [P * G]
    statistics: list[tuple[torch.Tensor, torch.Tensor]]  # [P * G] of [n]

    @property
    def num_generations(self) -> int:
        return len(self.completions) // len(self.pairs)

    def scored(
        self, form: TextFormat, config: TrainConfig, linear: LinearScore | None, prompts: Sequence[int] | None = None
    ) -> ScoredRollout:
        """The candidates of some of the prompts (None: all) with scores and advantages; linear None: the paper's S."""
        chosen, size = range(len(self.pairs)) if prompts is None else prompts, self.num_generations
        rows = [row for i in chosen for row in range(i * size, (i + 1) * size)]
        rollout = given_completions(
            form,
            [self.pairs[i].prompt_ids for i in chosen],
            [self.completions[row] for row in rows],
            [self.statistics[row] for row in rows],
        )
        return rank_candidates(rollout, rollout.logprobs, rollout.entropy, config, linear)


@dataclass(frozen=True)
class Start:
    """A loaded model with the data of its seed as its tokens."""

    policy: Policy
    form: TextFormat
    config: TrainConfig
    accelerator: Accelerator
    data: TaskData
    own: Pool | None = None  # candidates of the given prompts, whose answers are known: for calibration


def make_config(folder: Path, name: str, model: str, files: dict[str, Path], seed: int, **changes: Any) -> TrainConfig:
    return build_config({
        **SETTINGS, **changes, "seed": seed, "model": model, "output_dir": str(folder / name),
        "train_file": str(files["given"]), "eval_file": str(files["few"]),
    })  # fmt: skip


def train_sft(config: TrainConfig) -> Path:
    """SFT on the given pairs by `gem train`; the model's directory. An unfinished one is begun anew."""
    model = Path(config.output_dir) / "model"
    if not model.is_dir():
        shutil.rmtree(config.output_dir, ignore_errors=True)
        train(config, Console(quiet=True))
    return model


def open_start(model: str, files: dict[str, Path], config: TrainConfig) -> Start:
    source = find_model(model)
    form = text_format(load_tokenizer(source), config)
    accelerator = processes.make_accelerator(config.device)
    whole = load_model_for_training(source, load_model_config(source), config)
    form = dataclasses.replace(form, end_tokens=end_token_ids(whole, form.tokenizer, form.end_of_turn))
    policy = Policy(processes.prepare_model(whole, accelerator, config.max_grad_norm))
    return Start(policy, form, config, accelerator, load_task(files, form, config))


def load_or_sample_pool(path: Path, start: Start, pairs: list[TokenizedPair], step: int) -> Pool:
    """The candidates in the file, or new ones of the pairs' prompts, which are then written there."""
    if not path.is_file():
        config = start.config
        rollout = roll_out(
            start.policy, start.form, [pair.prompt_ids for pair in pairs], config,
            seed=config.seed, step=step, batch_size=config.rollout_batch_size,
            stats_temperature=config.score_temperature,
        )  # fmt: skip
        mask = rollout.batch.completion_mask
        rows = [
            {"ids": ids[kept], "logprobs": logprobs[kept].clone(), "entropy": entropy[kept].clone()}
            for ids, logprobs, entropy, kept in zip(
                rollout.batch.completion_ids, rollout.logprobs, rollout.entropy, mask
            )
        ]
        part = path.with_name(f".{path.name}.part")
        torch.save(rows, part)
        part.rename(path)
    rows = torch.load(path, weights_only=True)
    statistics = [(row["logprobs"], row["entropy"]) for row in rows]
    return Pool(pairs, [row["ids"].tolist() for row in rows], statistics)
