"""The command line of what reads: evaluate, score, config; every help fits a screen."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
import yaml

from gem import cli
from gem.config.read import build_config, load_config
from gem.config.settings import TrainConfig
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from tests.helpers import save_tiny

NEEDED = {"model": "m", "train_file": "t.jsonl", "output_dir": "o"}


def call(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gem", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model", context=1024)
    save_tiny(folder / "other", context=1024, seed=1)
    pairs = arithmetic_pairs(6, seed=3)
    write_jsonl(folder / "pairs.jsonl", pairs)
    renamed = [{"q": p["prompt"], "good": p["chosen"], "worse": p["rejected"], "truth": p["answer"]} for p in pairs]
    write_jsonl(folder / "renamed.jsonl", renamed)
    return folder


COLUMNS = ["--prompt-column", "q", "--chosen-column", "good", "--rejected-column", "worse", "--answer-column", "truth"]


def test_evaluate_with_mapped_columns_is_the_same(folder, monkeypatch, capsys):
    arguments = ["--json", "--generate", 2, "--sample", 2, "--max-completion-length", 8]
    command = ["evaluate", folder / "model"]
    code, plain, _ = call([*command, folder / "pairs.jsonl", *arguments], monkeypatch, capsys)
    assert code == 0
    _, mapped, _ = call([*command, folder / "renamed.jsonl", *arguments, *COLUMNS], monkeypatch, capsys)
    plain, mapped = json.loads(plain), json.loads(mapped)
    assert plain.pop("eval/seconds") and mapped.pop("eval/seconds") and plain == mapped
    assert plain["eval/preference_num_pairs"] == 6 and plain["eval/answer_num_problems"] == 2
    for key in ("preference_accuracy_mean", "calibration_error_low", "brier", "majority_accuracy", "gem/pairs_decided"):
        assert 0 <= plain[f"eval/{key}"] <= 1
    assert "eval/preference_accuracy_relative" not in plain


def test_evaluate_relative_to_a_reference(folder, monkeypatch, capsys):
    command = ["evaluate", folder / "model", folder / "pairs.jsonl", "--json", "--reduction", "relative", "--reference"]
    code, out, _ = call([*command, folder / "model"], monkeypatch, capsys)
    assert code == 0 and json.loads(out)["eval/preference_accuracy"] == 0.5  # all ties
    _, out, _ = call([*command, folder / "other"], monkeypatch, capsys)
    assert json.loads(out)["eval/preference_margin"] != 0
    code, _, err = call(command[:-1], monkeypatch, capsys)
    assert code == 2 and "--reference" in err


def test_score_finds_answers_as_asked(folder, monkeypatch, capsys):
    rows = [
        {"prompt": "1 + 1?", "completion": r"It is \boxed{2}", "answer": 2},
        {"prompt": "1 + 2?", "completion": "3", "answer": 3},
        {"prompt": "1 + 3?", "completion": " "},
    ]
    write_jsonl(folder / "answers.jsonl", rows)
    command = ["score", folder / "model", folder / "answers.jsonl", "--answer-span", "boxed,last_tokens:1"]
    code, _, err = call(command, monkeypatch, capsys)
    assert code == 2 and 'answers.jsonl:3: "completion" is empty' in err
    code, out, err = call([*command, "--skip-bad"], monkeypatch, capsys)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(r["final_answer"], r["found_by"], r["correct"]) for r in found] == [
        ("2", "boxed", True), ("3", "last_tokens:1", True)
    ]  # fmt: skip
    assert "left out 1 of 3 rows (1 bad)" in err and all(r["score_standard_error"] >= 0 for r in found)
    code, _, err = call([*command[:-1], "bold"], monkeypatch, capsys)
    assert code == 2 and "'bold'" in err and "boxed" in err


def test_train_needs_no_config_file(folder, tmp_path, monkeypatch, capsys):
    """Settings are flags then, and the file may stand after them."""
    paths = {"--model": folder / "model", "--train_file": folder / "pairs.jsonl", "--output_dir": tmp_path / "run"}
    flags = [word for pair in paths.items() for word in pair]
    command = ["train", "--preset", "safe", "--device", "cpu", *flags, "--dry-run"]
    code, alone, err = call(command, monkeypatch, capsys)
    assert (code, err) == (0, "") and "prompts to sample for" in alone and not (tmp_path / "run").exists()
    (tmp_path / "c.yaml").write_text("preset: safe\n")
    code, both, _ = call(["train", *flags, "--device=cpu", tmp_path / "c.yaml", "--dry-run"], monkeypatch, capsys)
    assert code == 0 and "prompts to sample for" in both
    code, _, err = call(["train", "--preset", "safe"], monkeypatch, capsys)
    assert code == 2 and "--model" in err and err.count("\n") == 1


@pytest.mark.parametrize("preset", ["paper", "safe"])
def test_a_printed_config_is_read_back(preset, tmp_path, monkeypatch, capsys):
    code, out, _ = call(["config", "--preset", preset], monkeypatch, capsys)
    assert code == 0 and set(yaml.safe_load(out)) == set(TrainConfig.model_fields)
    (tmp_path / "c.yaml").write_text(out)
    assert load_config(tmp_path / "c.yaml", [], **NEEDED) == build_config({**NEEDED, "preset": preset})
    code, _, err = call(["config", "--preset", "wild"], monkeypatch, capsys)
    assert code == 2 and "paper, safe" in err


@pytest.mark.parametrize("columns", [80, 120])
def test_every_help_fits_a_screen(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERMINAL_WIDTH", str(columns))
    for command in (
        "",
        "train",
        "calibrate",
        "evaluate",
        "score",
        "config",
        "data",
        "data arithmetic",
        "demo",
        "chat",
        "merge",
        "push",
    ):
        code, out, _ = call([*command.split(), "--help"], monkeypatch, capsys)
        lines = out.rstrip().splitlines()
        assert code == 0 and "Usage:" in out
        assert len(lines) <= 40 and max(map(len, lines)) <= columns, command


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    code, out, err = call(["--version"], monkeypatch, capsys)
    assert (code, out, err) == (0, f"gem-kernels {metadata.version('gem-kernels')}\n", "")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    code, out, err = call(["--version"], monkeypatch, capsys)
    assert code == 2 and out == "" and err.startswith("gem: --version: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", ["", "train", "data arithmetic"])
def test_h_is_help(command, monkeypatch, capsys):
    code, out, _ = call([*command.split(), "-h"], monkeypatch, capsys)
    assert code == 0 and out == call([*command.split(), "--help"], monkeypatch, capsys)[1]


def test_help_needs_no_model_library():
    """It is there at once: torch and transformers take seconds to import."""
    code = "import sys, gem.cli; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
