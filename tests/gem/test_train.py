"""The loop and the command line as a user meets them, on a model made in a moment."""

import io
import json
import math

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem import cli
from gem.checkpoint.states import save_model
from gem.config.read import build_config, load_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.evaluation.report import evaluation_table
from gem.files import write_jsonl
from gem.loop import TrainResult, train
from tests.helpers import save_tiny, tiny_model

TINY_RUN = {
    "num_generations": 3, "max_completion_length": 10, "max_steps": 3, "prompts_per_step": 4, "micro_batch_size": 2,
    "sft_epochs": 2, "sft_batch_size": 4, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 4,
    "eval_sample": 2, "system_prompt": "Think.", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory and a pairs file."""
    folder = tmp_path_factory.mktemp("gem")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(24))
    return folder


def config_of(folder, name, **more):
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    return build_config({**TINY_RUN, **{key: str(path) for key, path in paths.items()}, **more})


def metrics_of(result):
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def result(folder) -> TrainResult:
    return train(config_of(folder, "run"), Console(file=io.StringIO()))


def test_a_run_leaves_a_model_that_transformers_opens(folder, result):
    assert sorted(p.name for p in result.run_dir.iterdir()) == ["config.yaml", "metrics.jsonl", "model", "report.html"]
    assert (result.model_dir / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    start = AutoModelForCausalLM.from_pretrained(folder / "model")
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters())]
    assert all(moved)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder / "model").chat_template
    assert load_config(result.run_dir / "config.yaml") == config_of(folder, "run")


def test_metrics_say_what_happened(result):
    rows = metrics_of(result)
    assert [row["stage"] for row in rows] == ["eval", *["SFT"] * 10, "eval", "calibration", *["SEGA"] * 3, "eval"]
    sft = [row["loss"] for row in rows if row["stage"] == "SFT"]
    assert sft[-1] < sft[0]
    for row in rows:
        if row["stage"] == "SEGA":
            assert row["gem/score"] == pytest.approx(row["gem/h_fork"] - row["gem/h_final"], abs=1e-4)
            assert 0 <= row["gem/answer_span_found"] <= 1 and row["grad_norm"] > 0
            assert row["completions/min_length"] <= row["completions/mean_length"] <= 10
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert list(result.evaluations) == ["start", "SFT", "SEGA"]
    assert result.evaluations["start"].preference.num_pairs == 5  # a fifth of 24
    assert rows[-1]["eval/preference_accuracy"] == result.evaluations["SEGA"].preference.accuracy


def test_the_table_fits_a_terminal_and_shows_what_was_measured(result):
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_table(result.evaluations))
    lines = console.file.getvalue().splitlines()
    assert lines[1].split("  ")[-1].strip() == "after SEGA" and "start" in lines[1] and "after SFT" in lines[1]
    row = next(line for line in lines if "preference accuracy (5)" in line)
    assert row.split()[-3:] == [
        f"{result.evaluations[stage].preference.accuracy:.3f}" for stage in ("start", "SFT", "SEGA")
    ]
    assert "…" not in console.file.getvalue()


def test_the_same_seed_gives_the_same_run(folder, result):
    again = train(config_of(folder, "again"), Console(file=io.StringIO()))
    times = ("step_time", "eval/seconds")

    def numbers(of):
        return [{k: v for k, v in row.items() if k not in times} for row in metrics_of(of)]

    assert numbers(again) == numbers(result)
    one, two = (AutoModelForCausalLM.from_pretrained(r.model_dir) for r in (result, again))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_micro_batches_change_nothing_in_a_whole_run(folder, result):
    other = train(config_of(folder, "micro", micro_batch_size=1), Console(file=io.StringIO()))
    for one, two in zip(metrics_of(result), metrics_of(other)):
        if one["stage"] == "SFT":
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"prompt": "a"', [":25:", "not valid JSON"]),
        (b'{"prompt": "a", "chosen": "b"}', [":25:", "rejected"]),
        (b'{"prompt": "a", "chosen": "", "rejected": "c"}', [":25:", "empty"]),
        (json.dumps({"prompt": "x" * 600, "chosen": "b", "rejected": "c"}).encode(), [":25:", "context of 512"]),
    ],
)
def test_bad_data_is_one_line_exit_code_2_and_nothing_written(folder, tmp_path, bad, words, monkeypatch, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes((folder / "pairs.jsonl").read_bytes() + bad + b"\n")
    before = sorted(tmp_path.iterdir())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(
        {**TINY_RUN, "model": str(folder / "model"), "train_file": str(path), "output_dir": str(tmp_path / "out")}
    ))  # fmt: skip
    code, _, error = call(["train", str(tmp_path / "c.yaml")], monkeypatch, capsys)
    assert code == 2 and error.count("\n") == 1 and error.startswith("gem: ")
    for word in [str(path), *words]:
        assert word in error
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "c.yaml"])


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_a_missing_file_is_said_before_the_model_is_looked_at(folder, tmp_path, key, capsys):
    paths = {"train_file": str(folder / "pairs.jsonl"), key: str(tmp_path / "none.jsonl")}
    settings = {**TINY_RUN, **paths, "model": str(tmp_path / "no-model"), "output_dir": str(tmp_path / "out")}
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match=r"none\.jsonl: cannot read it: no such file"):
        train(build_config(settings), console)
    assert console.file.getvalue() == "" and list(tmp_path.iterdir()) == []


def test_a_run_is_never_written_over(folder, result):
    with pytest.raises(UserError, match="not empty"):
        train(config_of(folder, "run"), Console(file=io.StringIO()))


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def breaks(model, tokenizer, directory):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gem.checkpoint.states.save_pretrained", breaks)
    with pytest.raises(UserError, match="No space left"):
        save_model(tiny_model(), None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def call(arguments, monkeypatch, capsys):
    """(exit code, standard output, standard error) of `gem` with these arguments."""
    monkeypatch.setattr("sys.argv", ["gem", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_data_score_and_evaluate_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    pairs = tmp_path / "p.jsonl"
    assert call(["data", "arithmetic", "--pairs", "5", "--out", str(pairs)], monkeypatch, capsys)[0] == 0
    assert len(pairs.read_text().splitlines()) == 5
    model = str(folder / "model")
    code, out, _ = call(["score", model, str(pairs)], monkeypatch, capsys)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [r["row"][-2:] + r["source"] for r in rows[:3]] == [":1chosen", ":1rejected", ":2chosen"]
    assert len(rows) == 10 and all(r["correct"] == (r["source"] == "chosen") for r in rows)
    assert all(r["score"] == pytest.approx(r["h_fork"] - r["h_final"], abs=1e-4) for r in rows)

    scores = tmp_path / "scores.jsonl"
    flags = ["--sample", "3", "--max-completion-length", "6", "--out", str(scores)]
    assert call(["score", model, str(pairs), *flags], monkeypatch, capsys)[0] == 0
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(rows) == 15 and all(r["num_tokens"] <= 6 for r in rows)
    assert all(abs(sum(r["advantage"] for r in rows[i : i + 3])) < 1e-4 for i in range(0, 15, 3))
    assert call(["score", model, str(pairs), *flags], monkeypatch, capsys)[0] == 2  # scores.jsonl exists

    code, out, _ = call(["evaluate", model, str(pairs), "--json"], monkeypatch, capsys)
    result = json.loads(out)
    assert code == 0 and result["eval/preference_num_pairs"] == 5
    assert result["eval/preference_low"] <= result["eval/preference_accuracy"] <= result["eval/preference_high"]
    code, out, _ = call(["evaluate", model, str(pairs)], monkeypatch, capsys)
    assert code == 0 and "preference accuracy (5)" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["evaluate", "./no/such/model", "PAIRS"], "no such file or directory"),
        (["evaluate", "EMPTY", "PAIRS"], "neither config.json nor a .gguf file"),
        (["score", "MODEL", "missing.jsonl"], "missing.jsonl"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["data", "arithmetic", "--pairs", "3", "--out", "PAIRS"], "exists"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, arguments, word, monkeypatch, capsys):
    places = {"PAIRS": folder / "pairs.jsonl", "MODEL": folder / "model", "EMPTY": tmp_path}
    code, _, error = call([str(places.get(a, a)) for a in arguments], monkeypatch, capsys)
    lines = [line for line in error.splitlines() if line.startswith("gem: ")]
    assert code == 2 and len(lines) == 1 and word in lines[0] and "Traceback" not in error
