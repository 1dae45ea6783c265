"""Two gloo processes on a CPU give what one gives: metrics, samples and weights; whole, under LoRA, and sharded."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from gem_tiny import save_tiny
from rich.console import Console
from transformers import AutoModelForCausalLM

from gem.arithmetic import arithmetic_pairs
from gem.config import build_config
from gem.data import write_jsonl
from gem.train import train

# An odd number of prompts and micro-batches: the processes' shares differ.
RUN = {
    "num_generations": 2, "max_completion_length": 6, "max_steps": 3, "prompts_per_step": 3, "micro_batch_size": 1,
    "sft_epochs": 1, "sft_batch_size": 5, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 3,
    "eval_sample": 3, "system_prompt": "Think.", "device": "cpu", "save_steps": 2, "log_completions_steps": 1,
    "beta": 0.1, "num_iterations": 2, "epsilon": 0.2,
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 4}
CASES = {
    "full": ({}, {}),
    "lora": (LORA, {}),
    "fsdp2": ({}, {"ACCELERATE_USE_FSDP": "true"}),
    "fsdp2 lora": (LORA, {"ACCELERATE_USE_FSDP": "true"}),
    "dpo": ({"objective": "dpo", "beta": 0.0}, {}),
    "fsdp2 filtered dpo": ({"objective": "filtered_dpo"}, {"ACCELERATE_USE_FSDP": "true"}),
}
TIMES = ("step_time", "eval/seconds")
# At DPO's first step the policy is its reference: every margin is a tie, up to rounding.
TIES = ("rewards/accuracies",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gem")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(16))
    return folder


def settings(folder, name, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    return {**RUN, **{key: str(path) for key, path in paths.items()}, **more}


def launch(path, *flags, **environment):
    """Two processes of `gem train`; their output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*command, "-m", "gem", "train", str(path), *flags], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(run_dir, file="metrics.jsonl"):
    lines = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def assert_close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for key, value in ((k, v) for k, v in a.items() if k not in TIES):
            assert b[key] == (pytest.approx(value, rel=2e-3, abs=2e-4) if isinstance(value, float) else value), key


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(folder, case):
    more, environment = CASES[case]
    name = case.replace(" ", "-")
    alone = train(build_config(settings(folder, f"{name}-1", **more)), Console(file=io.StringIO()))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, f"{name}-2", **more)))
    output = launch(path, **environment)
    together = folder / f"{name}-2"
    assert output.count("Loading") == 1  # one process speaks
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.run_dir.iterdir())
    assert_close(rows(alone.run_dir), rows(together))
    if case != "dpo":
        assert_close(rows(alone.run_dir, "completions.jsonl"), rows(together, "completions.jsonl"))
    one, two = (AutoModelForCausalLM.from_pretrained(d / "model").state_dict() for d in (alone.run_dir, together))
    # AdamW makes up to a learning rate of rounding where a gradient is near 0: 1 weight of 27,296 was 1.1e-4 apart.
    assert all(torch.allclose(one[key], two[key], atol=3e-4) for key in one)


def test_shards_are_saved_whole_and_resumed_exactly(folder):
    """A sharded run whose last checkpoint is taken away repeats its end, to the bit."""
    import shutil

    path = folder / "again.yaml"
    path.write_text(yaml.safe_dump(settings(folder, "again")))
    launch(path, ACCELERATE_USE_FSDP="true")
    run_dir = folder / "again"
    before, weights = rows(run_dir), (run_dir / "model" / "model.safetensors").read_bytes()
    names = sorted((p.name for p in run_dir.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    shutil.rmtree(run_dir / names[-1])
    shutil.rmtree(run_dir / "model")
    output = launch(path, "--resume", ACCELERATE_USE_FSDP="true")
    assert f"Continuing from {names[-2]}" in output
    assert rows(run_dir) == before
    assert (run_dir / "model" / "model.safetensors").read_bytes() == weights
