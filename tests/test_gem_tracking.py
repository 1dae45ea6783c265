"""Where a run's numbers go, what its guards do, and what is asked for but not there."""

import io
import json

import pytest
import torch
from gem_tiny import save_tiny
from rich.console import Console

from gem import checkpoint, guards
from gem.arithmetic import arithmetic_pairs
from gem.config import build_config
from gem.data import write_jsonl
from gem.errors import UserError
from gem.tracking import JsonLines, check_report_to
from gem.train import train
from gem.trainer import Trainer

RUN = {
    "num_generations": 2, "max_completion_length": 6, "max_steps": 4, "prompts_per_step": 2, "micro_batch_size": 2,
    "sft_epochs": 0, "learning_rate": 1e-3, "eval_generate": 1, "eval_sample": 1, "system_prompt": "Think.",
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gem")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(12))
    return folder


def run(folder, name, console=None, **more):
    """(result, rows of metrics) of a run."""
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    config = build_config({**RUN, **{key: str(path) for key, path in paths.items()}, **more})
    result = train(config, console or Console(file=io.StringIO()))
    return result, [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_what_metrics_jsonl_holds(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, rows = run(folder, "board", report_to=["tensorboard"], eval_steps=2)
    events = EventAccumulator(str(result.run_dir / "tensorboard"))
    events.Reload()
    steps = [row for row in rows if row["stage"] == "SEGA"]
    for key in ("loss", "reward", "grad_norm", "completions/mean_length", "gem/score", "gem/h_final", "gem/h_fork"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-5, abs=1e-6)) for row in steps]
    evaluations = [event.step for event in events.Scalars("eval/preference_accuracy")]
    assert evaluations == [0, 2, 4]
    assert [row["after"] for row in rows if row["stage"] == "eval"] == ["start", "SEGA 2", "SEGA"]


def test_samples_are_a_table_and_a_file(folder):
    console = Console(file=io.StringIO(), width=100)
    result, _ = run(folder, "samples", console, log_completions_steps=2)
    rows = [json.loads(line) for line in (result.run_dir / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] * 4 + [4] * 4
    assert all(abs(rows[i]["advantage"] + rows[i + 1]["advantage"]) < 1e-5 for i in range(0, 8, 2))
    assert all(row["score"] == pytest.approx(row["h_fork"] - row["h_final"], abs=1e-4) for row in rows)
    shown = console.file.getvalue()
    assert "Samples, step 2" in shown and "Samples, step 4" in shown and f"{rows[0]['score']:.3f}" in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"report_to": ["wandb"]}, "report_to: wandb is not installed: pip install wandb"),
        ({"use_vllm": True}, "use_vllm: vllm is not installed: pip install vllm"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_url": "http://127.0.0.1:9"},
            "vllm_server_url: no answer from the vLLM server at http://127.0.0.1:9/health",
        ),
    ],
)
def test_what_is_asked_for_and_missing_is_one_error_before_anything_is_written(folder, monkeypatch, more, words):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in ("wandb", "vllm") else real(name, *a)
    )
    with pytest.raises(UserError) as error:
        run(folder, "missing", **more)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "missing").exists()
    check_report_to(["tensorboard"])


def test_a_resumed_file_is_cut_to_its_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    file = JsonLines(path)
    file.write({"step": 1})
    offset = file.offset
    file.write({"step": 2})
    file.close()
    file = JsonLines(path, offset)
    file.write({"step": "two"})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": "two"}\n'
    with pytest.raises(UserError, match="shorter than the checkpoint says"):
        JsonLines(path, 1000)


def breach(*steps):
    """A `breaches` that finds the length too long at these calls (from 0), besides no others."""
    calls = []

    def found(metrics, baseline, limits):
        if "reward" not in metrics:
            return []
        calls.append(1)
        return [guards.Breach("length", 9.0, 2.0, "too long")] if len(calls) - 1 in steps else []

    return found


def test_a_breach_lowers_lambda_from_the_next_step_on(folder, monkeypatch):
    monkeypatch.setattr(guards, "breaches", breach(1, 2))
    _, rows = run(folder, "lower", guards="lower_fork_weight", fork_weight=0.8)
    assert [row["gem/fork_weight"] for row in rows if row["stage"] == "SEGA"] == [0.8, 0.8, 0.4, 0.2]
    acts = [(row["step"], row["guards"]) for row in rows if row["stage"] == "guard"]
    assert acts == [(2, ["length"]), (3, ["length"])]


def test_a_breach_stops_the_stage_and_the_model_is_saved(folder, monkeypatch):
    monkeypatch.setattr(guards, "breaches", breach(1))
    result, rows = run(folder, "stop", guards="stop")
    assert [row["step"] for row in rows if row["stage"] == "SEGA"] == [1, 2]
    assert (result.model_dir / "model.safetensors").is_file() and "SEGA" in result.evaluations


def test_a_breach_goes_back_to_the_best_weights(folder, monkeypatch):
    """At the last step: what is saved are the weights of the best evaluation, the one at the start."""
    monkeypatch.setattr(guards, "breaches", breach(3))
    console = Console(file=io.StringIO(), width=200)
    result, rows = run(folder, "back", console, guards="rollback")
    saved = checkpoint.load_tensors(result.model_dir)
    start = checkpoint.load_tensors(folder / "model")
    assert all(torch.equal(saved[name], start[name]) for name in start)
    assert rows[-2]["done"] == "back to the weights of best-0"
    assert "Guard length: too long; back to the weights of best-0" in console.file.getvalue()


def test_warnings_change_nothing(folder, monkeypatch):
    _, plain = run(folder, "plain", beta=0.1)
    monkeypatch.setattr(guards, "breaches", breach(0, 1, 2, 3))
    _, warned = run(folder, "warned", guards="warn", beta=0.1)
    assert sum(row["stage"] == "guard" for row in warned) == 4

    def numbers(rows):
        return [(row["loss"], row["gem/score"], row["kl"]) for row in rows if row["stage"] == "SEGA"]

    assert numbers(warned) == numbers(plain)


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(folder, monkeypatch):
    bad = {1, 2}

    def backward(self, loss, real=Trainer.backward):
        real(self, loss * float("nan") if self.num_steps in bad else loss)

    monkeypatch.setattr(Trainer, "backward", backward)
    _, rows = run(folder, "skipping")
    steps = [row for row in rows if row["stage"] == "SEGA"]
    assert [bool(row.get("skipped")) for row in steps] == [False, True, True, False]
    assert [row["loss"] is None for row in steps] == [False, True, True, False]  # JSON has no NaN
    with pytest.raises(UserError, match=r"SEGA, step 3: .* not finite 2 times in a row; lower learning_rate"):
        run(folder, "stopping", max_bad_steps=2)


@pytest.mark.parametrize("objective", ["dpo", "filtered_dpo"])
def test_other_objectives_run(folder, objective):
    result, rows = run(folder, objective, objective=objective)
    name = {"dpo": "DPO", "filtered_dpo": "filtered DPO"}[objective]
    steps = [row for row in rows if row["stage"] == name]
    assert len(steps) == 4 and list(result.evaluations) == ["start", name]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # -log sigma(0): the policy is its own reference
    assert ("gem/score" in steps[0]) == (objective == "filtered_dpo")
    if objective == "dpo":
        assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and steps[-1]["grad_norm"] > 0
