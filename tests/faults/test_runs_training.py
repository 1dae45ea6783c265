"""A run that is ended, moved, damaged or misled: what comes out is the unbroken run's, to the bit, or one line."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from gem.checkpoint import states
from gem.checkpoint.folder import RunFolder
from gem.config.read import build_config, commented_config
from gem.config.settings import PRESETS, Scoring, SegaUpdate
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import Interrupted, UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.model.forward import Policy
from gem.run import save_points, session, tracking
from gem.run.metrics import rollout_metrics
from gem.scoring.score import score_rollout
from gem.update.optimizer import NO_STEP
from gem.update.sega import sega_step
from tests.faults.calls import call
from tests.faults.test_runs_folder import flip_a_bit
from tests.helpers import Killed, rollout_of, rows, save_tiny, saved_weights, tiny_model, trainer_of

RUN = {
    "num_generations": 2, "max_completion_length": 4, "max_steps": 3, "prompts_per_step": 2, "micro_batch_size": 2,
    "sft_epochs": 1, "sft_batch_size": 4, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 0,
    "eval_sample": 0, "system_prompt": "Think.", "device": "cpu", "beta": 0.1, "num_iterations": 2, "gate": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gem")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(8))
    return folder


def config_of(folder, run_dir, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": run_dir}
    return build_config({**RUN, **{key: str(path) for key, path in paths.items()}, **more})


def quiet():
    return Console(file=io.StringIO(), width=1000)


@pytest.fixture(scope="module")
def unbroken(folder):
    console = quiet()
    train(config_of(folder, folder / "unbroken"), console)
    (folder / "unbroken.txt").write_text(console.file.getvalue())
    return folder / "unbroken"


def at_line(monkeypatch, number, act):
    """`act()` once the run has written so many lines of metrics.jsonl."""
    count = 0

    def write(self, row, real=tracking.JsonLines.write):
        nonlocal count
        real(self, row)
        count += self.path.name == "metrics.jsonl"
        if count == number and self.path.name == "metrics.jsonl":
            act()

    monkeypatch.setattr(tracking.JsonLines, "write", write)


def killed():
    raise Killed


# metrics.jsonl: the evaluation, two steps of SFT, the evaluation, three steps of SEGA, the evaluation.
@pytest.mark.parametrize(
    ("line", "number", "saved"),
    [(1, signal.SIGINT, "checkpoint-0"), (6, signal.SIGHUP, "checkpoint-4")],
)
def test_a_signal_saves_a_checkpoint_and_the_moved_run_goes_on_to_the_bit(
    folder, unbroken, monkeypatch, tmp_path, line, number, saved
):
    with monkeypatch.context() as patch:
        at_line(patch, line, lambda: signal.raise_signal(number))
        with pytest.raises(Interrupted) as ended:
            train(config_of(folder, tmp_path / "run"), quiet())
    name = signal.Signals(number).name
    command = f"gem train {tmp_path / 'run' / 'config.yaml'} --resume"
    assert str(ended.value) == f"ended by {name}; {saved} is saved; continue: {command}"
    assert ended.value.exit_code == 128 + number and [p.name for p in states.checkpoints(tmp_path / "run")] == [saved]
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "rows.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    config = config_of(folder, tmp_path / "moved", train_file=str(tmp_path / "rows.jsonl"))
    path = tmp_path / "moved" / saved
    parameters, state = states.load_checkpoint(path)
    for odd in ({"random": [{}]}, {"progress": {"total_steps": state["progress"]["total_steps"], "step": 0, "x": 1}}):
        states.save_state(path, parameters, {**state, **odd}, states.needed_directories(path.parent))
        with pytest.raises(UserError, match=f"{saved} holds a state that does not fit this run"):
            train(config, quiet(), resume=True)
    states.save_state(path, parameters, state, states.needed_directories(path.parent))
    console = quiet()
    train(config, console, resume=True)
    assert f"Continuing from {saved}" in console.file.getvalue() and "began with" not in console.file.getvalue()
    assert rows(tmp_path / "moved") == rows(unbroken) and saved_weights(tmp_path / "moved") == saved_weights(unbroken)
    assert yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())["output_dir"] == str(tmp_path / "moved")


def test_the_line_after_ctrl_c_continues_a_run_of_flags_alone(folder, unbroken, monkeypatch, tmp_path):
    """As it stands, though no file of settings was given; a space in the folder's name is nothing to it."""
    run_dir = tmp_path / "a run"
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": run_dir}
    flags = [word for key, value in {**RUN, **paths}.items() for word in (f"--{key}", value)]
    with monkeypatch.context() as patch:
        at_line(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        code, _, errors = call("train", *flags)
    command = errors.rstrip().rpartition("; continue: gem ")[2]
    assert code == 130 and shlex.split(command) == ["train", f"{run_dir}/config.yaml", "--resume"], errors
    code, out, errors = call(*shlex.split(command))
    assert code == 0 and "Continuing from checkpoint-" in out, errors
    assert rows(run_dir) == rows(unbroken) and saved_weights(run_dir) == saved_weights(unbroken)


def test_a_second_signal_ends_at_once(folder, monkeypatch, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_line(patch, 2, twice)
        with pytest.raises(Interrupted) as ended:
            train(config_of(folder, tmp_path / "run"), quiet())
    assert str(ended.value) == "ended by SIGTERM at once; there is no checkpoint" and ended.value.exit_code == 143
    assert not states.checkpoints(tmp_path / "run")


def test_broken_checkpoints_are_named_and_the_newest_whole_one_is_taken(folder, unbroken, monkeypatch, tmp_path):
    config = config_of(folder, tmp_path / "run", save_steps=1, save_total_limit=3)
    counted = []
    monkeypatch.setattr(session, "fingerprint", lambda *a, real=session.fingerprint: (counted.append(1), real(*a))[1])
    with monkeypatch.context() as patch:
        at_line(patch, 7, killed)
        with pytest.raises(Killed):
            train(config, quiet())
    assert len(counted) == 1  # not at each checkpoint
    assert [path.name for path in states.checkpoints(tmp_path / "run")] == [f"checkpoint-{n}" for n in (2, 3, 4)]
    holder = RunFolder(tmp_path / "run")
    holder.take()
    for resume, words in ((True, "another process is training"), (False, "is not empty")):
        with pytest.raises(UserError, match=words):
            train(config, quiet(), resume=resume)
    holder.close()
    flip_a_bit(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    flip_a_bit(tmp_path / "run" / "starting-policy" / "model.safetensors")  # checkpoint-3 needs it too
    console = quiet()
    here = session.machine()
    monkeypatch.setattr(session, "machine", lambda: {**here, "threads": here["threads"] + 1})
    train(config, console, resume=True)
    said = console.file.getvalue()
    assert "checkpoint-4 is broken: model.safetensors is not what was written (its checksum differs); removed" in said
    assert "checkpoint-3 is broken: starting-policy/model.safetensors is not what was written" in said
    assert "Continuing from checkpoint-2: SFT, step 2" in said
    assert f"The run began with threads {here['threads']} (now {here['threads'] + 1}): what follows is not" in said
    assert f"OMP_NUM_THREADS={here['threads']}" in said
    assert rows(tmp_path / "run") == rows(unbroken) and saved_weights(tmp_path / "run") == saved_weights(unbroken)


def test_by_default_a_checkpoint_is_saved_every_ten_minutes(folder, monkeypatch, tmp_path):
    now = [0.0]

    def minutes(number):
        now[0] += 60 * number

    monkeypatch.setattr(save_points, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    at_line(monkeypatch, 2, lambda: minutes(9.9))
    saved = []

    def save(run_dir, step, *a, real=states.save_checkpoint):
        saved.append(step)
        return real(run_dir, step, *a)

    monkeypatch.setattr(states, "save_checkpoint", save)
    at_line(monkeypatch, 6, lambda: minutes(0.2))
    train(config_of(folder, tmp_path / "run"), quiet())
    assert saved == [4]


def test_candidates_that_are_all_cut_off_are_said_at_once_and_stop_the_run(folder, unbroken, tmp_path):
    said = (folder / "unbroken.txt").read_text()
    words = "every candidate was cut off at max_completion_length (4 tokens)"
    assert said.count(f"Warning: SEGA, step 1: {words}; their scores are those of unfinished answers") == 1
    console = quiet()
    with pytest.raises(UserError) as error:
        train(config_of(folder, tmp_path / "run", mask_truncated=True, sft_epochs=0, max_steps=9), console)
    assert f"SEGA, step 3: {words}, 3 steps in a row, so nothing was learned" in str(error.value)
    assert console.file.getvalue().count(f"Warning: SEGA, step 1: {words}; the step is skipped") == 1
    assert sum(row["stage"] == "SEGA" for row in rows(tmp_path / "run")) == 3


def test_with_a_kl_term_too_equal_scores_take_no_step():
    """The gradient of the KL term of weights that have not moved is rounding noise, and AdamW makes a step of it."""
    model = tiny_model()
    scored = score_rollout(Policy(model), rollout_of(num_prompts=2), Scoring(), batch_size=2)
    scored = dataclasses.replace(scored, advantages=torch.zeros(4))
    before = [p.clone() for p in model.parameters()]
    update = SegaUpdate(beta=0.1, epsilon=0.2)
    result = sega_step(trainer_of(model, learning_rate=1.0), scored, update, ref_logprobs=scored.logprobs)
    assert result is NO_STEP and all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_reward_std_is_of_the_candidates_that_count():
    scored = score_rollout(Policy(tiny_model()), rollout_of(num_prompts=2, size=4), Scoring(), batch_size=2)
    valid = torch.tensor([True, True, False, False, True, False, False, False])
    rewards = torch.tensor([-1.0, -4.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    scored = dataclasses.replace(scored, rewards=rewards, scores=dataclasses.replace(scored.scores, valid=valid))
    assert rollout_metrics(scored)["reward_std"] == pytest.approx(3 / 2**0.5)
    none = dataclasses.replace(
        scored, scores=dataclasses.replace(scored.scores, valid=torch.zeros(8, dtype=torch.bool))
    )
    assert rollout_metrics(none)["reward_std"] == 0.0


def test_a_service_that_cannot_begin_leaves_no_folder(folder, monkeypatch, tmp_path):
    def broken(config, run_dir, resumed):
        (run_dir / "tensorboard").mkdir()
        raise RuntimeError("no account")

    monkeypatch.setattr(tracking, "_TensorBoard", broken)
    with pytest.raises(UserError, match="report_to: tensorboard cannot begin: no account"):
        train(config_of(folder, tmp_path / "a" / "run", report_to=["tensorboard"]), quiet())
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_key_is_said_before_the_model_is_loaded(folder, monkeypatch, tmp_path):
    def login():
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    mode = types.SimpleNamespace(mode="online")
    fake = types.SimpleNamespace(setup=lambda: types.SimpleNamespace(settings=mode), login=login, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    console = quiet()
    with pytest.raises(UserError, match="report_to: wandb cannot begin: No API key configured"):
        train(config_of(folder, tmp_path / "run", report_to=["wandb"]), console)
    assert list(tmp_path.iterdir()) == [] and "Loading" not in console.file.getvalue()
    mode.mode = "offline"
    tracking._check_wandb()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_printed_configuration_runs_after_the_edits_that_the_readme_names(folder, tmp_path, preset):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    edits = re.search(r"gem config --preset .*; fill in (.+)", readme)[1].replace(" and ", ", ").split(", ")
    places = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": tmp_path / "run"}
    lines = commented_config(preset)
    for key in edits:
        lines, count = re.subn(rf"^{key}: .*$", f"{key}: {places[key]}", lines, flags=re.MULTILINE)
        assert count == 1
    config = build_config(yaml.safe_load(lines))
    assert config.save_minutes == 10 and config.preset == preset
    small = {key: value for key, value in RUN.items() if key not in ("beta", "gate", "num_iterations")}
    more = {"sft_epochs": 0, "max_steps": 1, "keep_best": False, "calibration_generations": 0, "gate": "off"}
    assert train(config.changed(**{**small, **more}), quiet()).model_dir.is_dir()
