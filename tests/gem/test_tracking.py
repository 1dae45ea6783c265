"""Where a run's numbers go, what its guards do, and what is asked for but not there."""

import io
import json
import sqlite3

import pytest
import torch
import yaml
from rich.console import Console

from gem import files
from gem.config.read import build_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.report.records import read_completions
from gem.run import guards
from gem.run.tracking import JsonLines, Tracker, check_report_to, completion_table
from gem.update.optimizer import Trainer
from tests.helpers import save_tiny
from tests.processes import Fork, run_script

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
    completions = read_completions(result.run_dir / "completions.jsonl")
    assert [one.label for one in completions[:4]] == ["1", "2", "1", "2"] and len({c.group for c in completions}) == 4
    for row, one in zip(rows, completions):
        assert row["stage"] == "SEGA" and isinstance(row["correct"], bool) and len(row["features"]) == 9
        tokens = "".join(row["tokens"])
        assert tokens == row["completion"] + ("" if row["truncated"] else "<|im_end|>") and one.tokens.text
        assert len(row["entropy"]) == len(row["logprob"]) == len(row["fork"]) == row["features"]["length"]
        assert sum(row["logprob"]) == pytest.approx(row["features"]["sum_logprob"], abs=1e-3)
        assert row["features"]["fork_entropy"] == row["h_fork"]
    shown = console.file.getvalue()
    assert "Samples, step 2" in shown and "Samples, step 4" in shown and f"{rows[0]['score']:.3f}" in shown


def test_a_samples_text_is_neither_markup_nor_an_escape_sequence():
    row = {"prompt": "\\[/b] [red]", "completion": "\x1b[2J[/i]", "score": 1.0, "advantage": 0.5}
    console = Console(file=io.StringIO(), width=100, force_terminal=True, no_color=True)
    console.print(completion_table([row], 1))
    shown = console.file.getvalue()
    assert "\\[/b] [red]" in shown and "[/i]" in shown and "\x1b[2J" not in shown


# `gem` in a process that reaches no other machine, and that ends at the third step: killed when the services
# have had a second to write, or with an error of the user's.
SCRIPT = """
import os, signal, sys, time
from gem import cli
from gem.run import tracking

def no_network(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        os._exit(99)

sys.addaudithook(no_network)
end, write = sys.argv.pop(1), tracking.Tracker.write

def ending(self, row, total_steps):
    write(self, row, total_steps)
    if row.get("step") == 3 and end == "killed":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    if row.get("step") == 3 and end == "failed":
        raise tracking.UserError("enough")

tracking.Tracker.write = ending
cli.main()
"""


def gem_process(folder, end, name, service, *flags):
    """`gem train` on two checkpoints of two steps each; its exit code and all that it printed."""
    path = folder / f"{name}.yaml"
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    more = {"report_to": [service], "save_steps": 2, "eval_steps": 2}
    path.write_text(yaml.safe_dump({**RUN, **more, **{key: str(path) for key, path in paths.items()}}))
    (folder / "script.py").write_text(SCRIPT)
    environment = {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline"}
    fork = Fork(run_script, folder / "script.py", end, "train", path, *flags, environment=environment).wait()
    return fork.returncode, fork.output


def read_tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def read_trackio(run_dir):
    with sqlite3.connect(run_dir.parent / "trackio" / "gem.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", [run_dir.name]).fetchall()
    return [(step, name, value) for step, row in rows for name, value in json.loads(row).items()]


def wandb_records(run_dir):
    """Of all offline files: records in blocks of 32 KiB, each part behind 4 bytes checksum, 2 length and 1 kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in (run_dir / "wandb").glob("offline-run-*/*.wandb"):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                yield Record.FromString(whole)
                whole = b""


def read_wandb(run_dir):
    found = []
    for record in wandb_records(run_dir):
        row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        found += [(row["_step"], name, value) for name, value in row.items() if name[0] != "_"]
    return found


def expected_values(run_dir):
    """What metrics.jsonl holds, as a service should."""
    found, step = [], 0
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        step = row.get("step", step)
        names = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        prefix = {"SEGA": "train/", "calibration": "calibration/"}.get(row["stage"], "")
        found += [(step, prefix + name, v) for name, v in names.items()]
    return found


@pytest.mark.parametrize("service", ["tensorboard", "trackio", "wandb"])
def test_a_service_holds_what_metrics_jsonl_holds_after_a_kill_and_after_an_error(folder, service):
    pytest.importorskip(service)
    read = {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb}[service]

    def assert_same(run_dir):
        found, expected = sorted(read(run_dir)), sorted(expected_values(run_dir))
        assert [x[:2] for x in found] == [x[:2] for x in expected]
        assert [x[2] for x in found] == pytest.approx([x[2] for x in expected], rel=1e-5, abs=1e-6)
        return {step for step, _, _ in found}

    killed, failed = f"{service}-killed", f"{service}-failed"
    assert gem_process(folder, "killed", killed, service)[0] == -9
    code, output = gem_process(folder, "none", killed, service, "--resume")
    assert code == 0 and "Continuing from checkpoint-2" in output, output
    assert assert_same(folder / killed) == {0, 1, 2, 3, 4}
    own = [line for line in output.splitlines() if line.startswith(("wandb:", "* "))]
    assert len(own) <= 10  # wandb alone would print sixty at the end

    code, output = gem_process(folder, "failed", failed, service)
    assert code == 2 and "gem: enough" in output, output
    assert assert_same(folder / failed) == {0, 1, 2, 3}
    if service == "wandb":
        assert [r.exit.exit_code for r in wandb_records(folder / failed) if r.HasField("exit")] == [1]
        assert [r.exit.exit_code for r in wandb_records(folder / killed) if r.HasField("exit")] == [0]


def test_services_go_on_from_the_rows_that_a_checkpoint_knows(tmp_path, monkeypatch):
    """Every service gets the rows again at the steps they stood at, and one that cannot begin is one clear line."""
    given = []

    class Service:
        def __init__(self, config, run_dir, resumed):
            assert resumed

        def write(self, values, step):
            given.append((step, values))

        def close(self, failed):
            given.append(failed)

    def broken(config, run_dir, resumed):
        raise RuntimeError("no account\nanywhere")

    rows = [{"stage": "eval", "after": "start", "eval/x": 0.5}, {"stage": "SFT", "step": 1, "loss": 2.0}]
    rows += [{"stage": "guard", "step": 0, "value": 3.0}, {"stage": "SEGA", "step": 1, "loss": None, "kl": 1.0}]
    file = JsonLines(tmp_path / "metrics.jsonl")
    for row in rows:
        file.write(row)
    offsets = {"metrics.jsonl": file.offset}
    file.write({"stage": "SEGA", "step": 2, "kl": 2.0})
    file.close()
    config = build_config({"model": "m", "train_file": "t", "output_dir": "o", "report_to": ["tensorboard"]})
    monkeypatch.setattr("gem.run.tracking._TensorBoard", Service)
    tracker = Tracker(config, tmp_path, Console(file=io.StringIO()), offsets=offsets, step=2)
    tracker.write({"stage": "SEGA", "step": 2, "kl": 4.0}, 3)
    tracker.close(failed=True)
    tracker.close()
    assert given == [
        (0, {"eval/x": 0.5}), (1, {"sft/loss": 2.0}), (1, {"train/value": 3.0}), (2, {"train/kl": 1.0}),
        (3, {"train/kl": 4.0}), True,
    ]  # fmt: skip
    monkeypatch.setattr("gem.run.tracking._TensorBoard", broken)
    with pytest.raises(UserError, match="report_to: tensorboard cannot begin: no account anywhere; set it up"):
        Tracker(config, tmp_path, Console(file=io.StringIO()), offsets=offsets, step=2)


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
    saved = files.load_tensors(result.model_dir)
    start = files.load_tensors(folder / "model")
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
