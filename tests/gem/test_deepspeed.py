"""DeepSpeed's ZeRO on two gloo processes gives what one plain process gives, and what it must not do."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from gem.config.read import build_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.parallel import deepspeed as zero
from gem.parallel import processes
from tests.helpers import LORA, assert_close, assert_same_weights, launch, rows, save_tiny, settings
from tests.processes import run_ranks, run_script

# Every weight of the tiny model is divided, as a large model's are; by default the small ones stay whole.
STAGES = {1: {"stage": 1}, 2: {"stage": 2}, 3: {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(16))
    for stage, section in STAGES.items():
        (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": section}))
    return folder


@pytest.fixture
def deepspeed(folder):
    """Around each test of it: on a CPU nothing is compiled, which would take a compiler and a minute."""
    if not zero.is_installed():
        pytest.skip("deepspeed is not installed")
    yield
    assert not [path for path in (folder / "compiled").rglob("*") if path.is_file()]


def environment(folder, stage):
    return {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / f"{stage}.json"),
        "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
    }  # fmt: skip


def assert_same_run(alone, together):
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())
    assert_close(rows(alone), rows(together))
    assert_close(rows(alone, "completions.jsonl"), rows(together, "completions.jsonl"))
    one, two = (AutoModelForCausalLM.from_pretrained(d / "model").state_dict() for d in (alone, together))
    assert_same_weights(one, two)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage, more", [(1, {}), (2, LORA), (3, LORA)], ids=["1", "2 lora", "3 lora"])
def test_two_processes_are_one(folder, stage, more):
    alone = train(build_config(settings(folder, f"alone{stage}", **more)), Console(file=io.StringIO()))
    path = folder / f"zero{stage}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, f"zero{stage}", **more)))
    output = launch(path, **environment(folder, stage))
    assert output.count("Loading") == 1  # one process speaks
    assert_same_run(alone.run_dir, folder / f"zero{stage}")


@pytest.mark.usefixtures("deepspeed")
def test_a_run_of_two_processes_is_one_and_is_resumed_exactly(folder):
    """A run whose last checkpoint is taken away repeats its end, to the bit: weights, moments and masters came back."""
    alone = train(build_config(settings(folder, "alone")), Console(file=io.StringIO()))
    path, run_dir = folder / "again.yaml", folder / "again"
    path.write_text(yaml.safe_dump(settings(folder, "again")))
    launch(path, **environment(folder, 3))
    assert_same_run(alone.run_dir, run_dir)
    before, weights = rows(run_dir), (run_dir / "model" / "model.safetensors").read_bytes()
    names = sorted((p.name for p in run_dir.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    shutil.rmtree(run_dir / names[-1])
    shutil.rmtree(run_dir / "model")
    output = launch(path, "--resume", **environment(folder, 3))
    assert f"Continuing from {names[-2]}" in output
    assert rows(run_dir) == before
    assert (run_dir / "model" / "model.safetensors").read_bytes() == weights


SCRIPT = """
import math, sys
import torch
sys.path.insert(0, {tests!r})
from tests.helpers import tiny_model
from gem.parallel import processes
from gem.checkpoint import states
from gem.data.batches import collate
from gem.config.settings import OptimizerSettings
from gem.model.forward import Policy, completion_stats, measured_stats
from gem.model.starting_policy import StartingPolicy
from gem.rollout.vllm import policy_weights
from gem.update.deepspeed_optimizer import DeepSpeedTrainer

model = tiny_model().to({dtype})
accelerator = processes.make_accelerator("cpu")
model = processes.prepare_model(model, accelerator, 1.0)
batch = collate([[5, 6, 7], [6, 6]], [[8, 9, 10, 11], [12, 9]], 0)

def trainer_of(rate, **settings):
    settings = OptimizerSettings(micro_batch_size=1, **settings)
    return DeepSpeedTrainer(Policy(model), accelerator, settings, learning_rate=rate, total_steps=9)

def weights():
    return states.trained_parameters(model)

def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)

def step(trainer, factor=1.0):
    for (i,), weight in trainer.micro_batches([0, 1]):
        stats = completion_stats(Policy(model), batch.select_prompts(i, i + 1))
        trainer.backward(-factor * weight * stats.logprobs.sum())
    return trainer.step()

start = weights()
trainer = trainer_of(1e-2, weight_decay=0.1)
assert equal(start, weights()), "making the moments moved the weights"
outcome = step(trainer)
assert not outcome.skipped and outcome.grad_norm > 0
moved = weights()
assert not equal(start, moved)

# A loss that is not finite: the step is skipped, counted, and the next one is as if it had not been.
outcome = step(trainer, math.nan)
assert outcome.skipped and math.isnan(outcome.loss) and trainer.bad_steps == 1 and equal(moved, weights())
state = trainer.state_dict()
assert state["adam_steps"] == 1 and not step(trainer).skipped and trainer.bad_steps == 0
after = weights()

# Back to the state: the same step again, to the bit.
states.restore_parameters(model, moved)
trainer.load_state_dict(state)
assert equal(moved, weights()) and not step(trainer).skipped and equal(after, weights())

# Weights that are set stay set: the optimizer's own weights follow.
states.restore_parameters(model, start)
still = trainer_of(0.0)
assert not step(still).skipped and equal(start, weights())

# The starting policy is itself, and the policy is not touched by it.
logprobs = measured_stats(Policy(model), batch, batch_size=2).logprobs
reference = StartingPolicy(model)
fresh = trainer_of(1e-2)
step(fresh)
later = weights()
kept = reference.state_dict()
assert equal(start, kept) and equal(later, weights())
with reference.active():
    assert torch.allclose(measured_stats(Policy(model), batch, batch_size=2).logprobs, logprobs)
assert equal(later, weights())
again = StartingPolicy(model)
again.load_state_dict(kept)
assert equal(kept, again.state_dict()) and equal(later, weights())

# What vLLM is given is whole, under every name of a tied weight.
handed = policy_weights(model)
assert equal(later, handed) and set(handed) == set(model.state_dict())
print("all of it")
processes.shut_down()
"""


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage, dtype", [(1, "torch.float32"), (2, "torch.bfloat16"), (3, "torch.bfloat16")])
def test_steps_of_one_process(folder, tmp_path, stage, dtype):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[2]), dtype=dtype))
    assert "all of it" in run_ranks(1, run_script, script, environment=environment(folder, stage))


def fill(config, *dtypes):
    zero.fill_config(config, set(dtypes or [torch.float32]), 1.0)
    return config


def test_the_runs_own_settings_go_into_deepspeeds_config():
    given = {"zero_optimization": {"stage": 2}, "train_batch_size": 64, "gradient_accumulation_steps": "auto"}
    config = fill(given, torch.bfloat16)
    assert config["bf16"] == {"check_grad_overflow": True, "enabled": True}
    assert config["gradient_clipping"] == 1.0 and config["gradient_accumulation_steps"] == 1
    assert "train_batch_size" not in config and config["zero_optimization"] == {"stage": 2}
    assert fill({"zero_optimization": {"stage": 1}})["bf16"]["enabled"] is False


@pytest.mark.parametrize(
    "more, words",
    [
        ({"zero_optimization": {}}, "zero_optimization.stage is 0; expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": "three"}}, 'stage is "three"'),
        ({"optimizer": {"type": "Lion"}}, "remove 'optimizer' from its config; learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove 'scheduler'"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled in its config, but dtype is float32"),
        ({"bf16": {"enabled": True}}, "bf16 is enabled in its config, but dtype is float32"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but max_grad_norm is 1.0"),
    ],
)
def test_what_differs_from_the_runs_settings_is_refused(more, words):
    with pytest.raises(UserError, match="deepspeed: ") as caught:
        fill({"zero_optimization": {"stage": 2}, **more})
    assert words in str(caught.value)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "is_installed", lambda: False)
    with pytest.raises(UserError, match="deepspeed is not installed: pip install deepspeed"):
        processes.make_accelerator("cpu")
