"""A run that was cut off and continued ends as if it had not been: the same metrics, to the bit, each step once."""

import io
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from rich.console import Console

from gem.checkpoint import states
from gem.config.read import build_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.run.session import MAY_CHANGE
from tests.helpers import Killed, rows, save_tiny, saved_weights, tiny_model, trainer_of
from tests.processes import Fork, gem

# LoRA's dropout draws from the generators, and the second adapter weight is random: both must come back.
RUN = {
    "num_generations": 2, "max_completion_length": 6, "max_steps": 8, "prompts_per_step": 2, "micro_batch_size": 1,
    "sft_epochs": 1, "sft_batch_size": 2, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 1,
    "eval_sample": 1, "system_prompt": "Think.", "device": "cpu", "save_steps": 2, "eval_steps": 3,
    "log_completions_steps": 2, "lr_schedule": "linear", "beta": 0.1, "num_iterations": 2, "epsilon": 0.2,
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gem")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(15))
    return folder


def config_of(folder, name, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    return build_config({**RUN, **{key: str(path) for key, path in paths.items()}, **more})


def quiet():
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def unbroken(folder):
    train(config_of(folder, "unbroken", **LORA), quiet())
    return folder / "unbroken"


def command(folder, name, *flags):
    """The arguments of `gem`."""
    config = {**RUN, **LORA, "model": str(folder / "model"), "train_file": str(folder / "pairs.jsonl")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "output_dir": str(folder / name)}))
    return ["train", str(path), *flags]


def wait_for(condition, fork, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert fork.returncode is None, fork.output
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_three_random_moments(folder, unbroken):
    """The first kill waits for a first checkpoint, each later one for a line of metrics; then a random while."""
    run_dir, moments = folder / "killed", random.Random(0)
    for kill in range(3):
        fork = Fork(gem, *command(folder, "killed", *(["--resume"] if kill else [])), threads=torch.get_num_threads())
        before = (run_dir / "metrics.jsonl").stat().st_size if kill else 0
        lines = run_dir / "metrics.jsonl"
        wait_for(lambda: states.checkpoints(run_dir), fork)
        wait_for(lambda lines=lines, before=before: lines.exists() and lines.stat().st_size != before, fork)
        time.sleep(moments.uniform(0, 0.4))
        fork.kill()
        assert fork.returncode == -signal.SIGKILL, fork.output
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    last = [sys.executable, "-m", "gem", *command(folder, "killed", "--resume")]  # a process that no one forked, once
    done = subprocess.run(last, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Continuing from checkpoint-" in done.stdout
    assert rows(run_dir) == rows(unbroken)
    assert (run_dir / "completions.jsonl").read_bytes() == (unbroken / "completions.jsonl").read_bytes()
    assert saved_weights(run_dir) == saved_weights(unbroken)
    assert not list(run_dir.glob(".*"))


def cut_off(config, monkeypatch, at):
    """The run, up to the moment after its `at`-th line of metrics."""
    from gem.run.tracking import JsonLines

    count = 0

    def write(self, row, real=JsonLines.write):
        nonlocal count
        real(self, row)
        if self.path.name == "metrics.jsonl":
            count += 1
            if count == at:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", write)
        with pytest.raises(Killed):
            train(config, quiet())


@pytest.mark.parametrize("at", [5, 8, 12])
def test_full_weights_continue_within_sft_and_within_sega(folder, monkeypatch, at):
    whole = folder / "full"
    if not whole.exists():
        train(config_of(folder, "full"), quiet())
    config = config_of(folder, f"full-{at}")
    cut_off(config, monkeypatch, at)
    (folder / f"full-{at}" / ".checkpoint-1.old").mkdir()  # as a kill during a removal leaves it
    resumed = train(config, quiet(), resume=True)
    assert rows(resumed.run_dir) == rows(whole)
    assert saved_weights(resumed.run_dir) == saved_weights(whole)
    assert not list(resumed.run_dir.glob(".*"))
    assert list(resumed.evaluations) == ["start", "SFT", "SEGA"]


def test_old_checkpoints_go_and_the_newest_stay(unbroken):
    steps = [int(path.name.removeprefix("checkpoint-")) for path in states.checkpoints(unbroken)]
    total = sum(row["stage"] in ("SFT", "SEGA") for row in rows(unbroken))
    assert steps == [total - 2, total]
    parameters, state = states.load_checkpoint(states.checkpoints(unbroken)[-1])
    assert all("lora_" in name for name in parameters)
    assert state["progress"]["total_steps"] == total


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("writer", ["checkpoint.states.save_file", "checkpoint.states.torch.save", "files._flush"])
def test_a_full_disk_leaves_the_last_good_checkpoint(folder, monkeypatch, writer, tmp_path):
    config = config_of(folder, "full-disk", output_dir=str(tmp_path / "run"))
    calls = []

    def third(step, *arguments, real=states.save_checkpoint):
        calls.append(step)
        if len(calls) == 3:
            monkeypatch.setattr(f"gem.{writer}", no_space)
        return real(step, *arguments)

    monkeypatch.setattr("gem.checkpoint.states.save_checkpoint", third)
    with pytest.raises(UserError, match=r"cannot save .*-6: No space left.*last good checkpoint is checkpoint-4"):
        train(config, quiet())
    monkeypatch.undo()
    run_dir = tmp_path / "run"
    assert [path.name for path in states.checkpoints(run_dir)] == ["checkpoint-2", "checkpoint-4"]
    assert not list(run_dir.glob(".*"))
    train(config, quiet(), resume=True)
    assert len(rows(run_dir)) == len({(r["stage"], r.get("step"), r.get("after")) for r in rows(run_dir)})


def test_a_mistaken_resume_is_one_clear_error(folder, unbroken, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="there is no run in"):
        train(config_of(folder, "never"), quiet(), resume=True)
    with pytest.raises(UserError, match="is complete"):
        train(config_of(folder, "unbroken", **LORA), quiet(), resume=True)
    assert not (folder / "never").exists()

    config = config_of(folder, "cut", save_steps=0)
    cut_off(config, monkeypatch, 3)
    with pytest.raises(UserError, match="no checkpoint"):
        train(config, quiet(), resume=True)

    config = config_of(folder, "cut-2")
    cut_off(config, monkeypatch, 6)
    with pytest.raises(UserError, match=f"learning_rate changed.*0.001.*{MAY_CHANGE[0]}"):
        train(config_of(folder, "cut-2", learning_rate=1.0), quiet(), resume=True)
    lines = (folder / "pairs.jsonl").read_text()
    try:
        (folder / "pairs.jsonl").write_text(lines.replace("Final Answer: 1", "Final Answer: 2"))
        with pytest.raises(UserError, match="no longer holds the pairs"):
            train(config, quiet(), resume=True)
    finally:
        (folder / "pairs.jsonl").write_text(lines)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    states.save_file({"x": torch.zeros(1)}, directory / "model.safetensors")
    torch.save({"progress": Bomb()}, directory / "state.pt")
    with pytest.raises(UserError, match="cannot read"):
        states.load_checkpoint(directory)
    assert not (tmp_path / "ran").exists()


def test_the_optimizer_continues_exactly():
    """Two steps, saved, two more: as four in a row."""

    def trainer(model):
        return trainer_of(model, learning_rate=1e-2, total_steps=4, lr_schedule="linear")

    def steps(trainer, number):
        for _ in range(number):
            trainer.backward(trainer.model(torch.tensor([[1, 2, 3 + trainer.num_steps]])).logits.logsumexp(-1).sum())
            trainer.step()

    whole, first, second = trainer(tiny_model()), trainer(tiny_model()), trainer(tiny_model(seed=1))
    steps(whole, 4)
    steps(first, 2)
    states.restore_parameters(second.model, states.trained_parameters(first.model))
    second.load_state_dict(first.state_dict())
    steps(second, 2)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), second.model.parameters()))
    assert second.num_steps == 4
