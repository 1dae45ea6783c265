"""TRL's GRPO on sums of two numbers, with this package's kernels under it.

    pip install -e . 'trl>=1.16'
    python examples/trl_grpo.py [model] [output folder]

Needs TRL 1.16 (its private names are checked). Settings are those of TRL's GRPOConfig; everything but the line
`use_gem_kernels()` is TRL's own.
"""

from __future__ import annotations

import random
import re
import sys
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from gem_kernels.integrations.trl import use_gem_kernels


def sums(n: int, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(n)]
    return Dataset.from_list([{"prompt": f"What is {a} + {b}? Answer:", "answer": str(a + b)} for a, b in pairs])


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the first number of the completion is the sum."""
    found = (re.search(r"\d+", text) for text in completions)
    return [float(match is not None and match[0] == want) for match, want in zip(found, answer)]


def main(
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct", output_dir: str = "trl_grpo", **settings: Any
) -> GRPOTrainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 16,
        "max_steps": 100,
        "learning_rate": 2e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }
    config = GRPOConfig(output_dir=output_dir, **(defaults | settings))
    with use_gem_kernels():
        trainer = GRPOTrainer(model, reward_funcs=right, args=config, train_dataset=sums(512))
        trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
