"""SEGA in TRL on word problems: the reward is the score that the model gives its own answers, and nothing else.

    pip install -e '.[train]' 'trl>=1.16'
    python examples/trl_sega.py [model] [score.json] [output folder]

The score is the paper's, or the one in a score.json, which knows more:

    gem data arithmetic --pairs 48 --out pairs.jsonl
    gem calibrate MODEL pairs.jsonl --out score.json

Settings are those of SEGAConfig, which are GRPOConfig's and a few more. `use_gem_kernels()` is optional.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset

from gem.config.settings import SYSTEM_PROMPT
from gem.demo.arithmetic import arithmetic_pairs
from gem_kernels.integrations.trl import use_gem_kernels
from gem_kernels.integrations.trl_sega import SEGAConfig, SEGATrainer


def problems(n: int, seed: int = 0) -> Dataset:
    """Questions alone: no answers, no rewards."""
    system = {"role": "system", "content": SYSTEM_PROMPT}
    pairs = arithmetic_pairs(n, seed)
    return Dataset.from_list([{"prompt": [system, {"role": "user", "content": pair["prompt"]}]} for pair in pairs])


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    score: str = "paper",
    output_dir: str = "trl_sega",
    **settings: Any,
) -> SEGATrainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 72,
        "max_steps": 100,
        "learning_rate": 1e-5,
        "beta": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }
    config = SEGAConfig(output_dir, score=score, answer_marker="Final Answer:", **(defaults | settings))
    with use_gem_kernels():
        trainer = SEGATrainer(model, args=config, train_dataset=problems(256))
        trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
