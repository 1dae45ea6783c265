"""The method from Python: names and objects, rows in memory, the same checks, nothing of the process changed."""

import json
import random
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console

import gem
from gem import loop
from gem.calibration.score_file import Platt, read_score
from gem.data.answers import normalize_answer
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from gem.loop import write_page
from gem.report.records import read_completions
from gem.run.keep_best import Change
from gem.terminal.console import set_level
from tests.gem.test_cli import call
from tests.gem.test_use import fitted
from tests.helpers import save_tiny, tiny_model, tiny_tokenizer

RUN = {
    "num_generations": 2, "max_completion_length": 6, "max_steps": 1, "prompts_per_step": 2, "sft_epochs": 0,
    "learning_rate": 1e-3, "eval_generate": 1, "eval_sample": 1, "system_prompt": "Think.", "device": "cpu",
    "log_completions_steps": 1, "gate": "off",
}  # fmt: skip
PAIRS = arithmetic_pairs(6, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    save_tiny(folder / "model", context=1024)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture
def objects(folder):
    model = tiny_model(context=1024)
    return model.train(), tiny_tokenizer()


@pytest.fixture
def same_state():
    """The global generators, before and after."""
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    yield
    found = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    assert found == (random.random(), np.random.rand(), torch.rand(()).item())


def test_importing_gem_imports_no_model_library():
    code = (
        "import sys, gem; assert gem.UserError and 'train' in dir(gem)\n"
        "print({'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    assert callable(gem.train) and set(gem.__all__) <= set(dir(gem))
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        _ = gem.tran


def test_score_is_what_the_command_writes(folder, objects, same_state, monkeypatch, capsys):
    settings = {"num_generations": 2, "max_completion_length": 8, "tokens": True}
    command = ["score", folder / "model", folder / "pairs.jsonl", "--sample", 2, "--max-completion-length", 8]
    _, out, _ = call([*command, "--tokens"], monkeypatch, capsys)
    written = [json.loads(line) for line in out.splitlines()]
    by_path = gem.score(str(folder / "model"), folder / "pairs.jsonl", **settings)
    assert by_path == written
    for rows in (PAIRS, datasets.Dataset.from_list(PAIRS)):
        found = gem.score(objects, rows, **settings)
        places = [row.pop("row") for row in found]
        assert places[:3] == ["data row 0", "data row 0", "data row 1"]
        assert found == [{key: value for key, value in row.items() if key != "row"} for row in written]
    assert capsys.readouterr() == ("", "")
    assert all(module.training for module in objects[0].modules())


def test_score_and_generate_by_a_calibrated_score(folder, objects, same_state):
    score = fitted(model=str(folder / "model"), platt=Platt(slope=0.7, intercept=-0.3, count=40))
    settings = {"num_generations": 3, "max_completion_length": 8, "best": True, "score": score}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (best,) = gem.score(folder / "model", PAIRS[:1], **settings)
        (answer,) = gem.generate(folder / "model", PAIRS[0]["prompt"], **settings)
    for key in ("completion", "score", "probability", "agreement", "num_candidates"):
        assert best[key] == answer[key]
    with pytest.warns(UserWarning, match="was fitted for"):
        (other,) = gem.generate(objects, [{"role": "user", "content": PAIRS[0]["prompt"]}], **settings)
    assert other["completion"] == best["completion"]


def test_evaluate_is_what_the_command_prints(folder, objects, same_state, monkeypatch, capsys):
    command = ["evaluate", folder / "model", folder / "pairs.jsonl", "--json", "--generate", 2, "--sample", 2]
    _, out, _ = call([*command, "--max-completion-length", 8], monkeypatch, capsys)
    row = json.loads(out)
    result = gem.evaluate(objects, PAIRS, eval_generate=2, eval_sample=2, max_completion_length=8)
    assert result.preference.accuracy == row["eval/preference_accuracy"] and result.preference.num_pairs == 6
    assert result.preference.margin == pytest.approx(row["eval/preference_margin"], rel=1e-6)
    assert result.sampled.majority.value == row["eval/majority_accuracy"]
    same = gem.evaluate(objects, PAIRS, reference=folder / "model", preference_reduction="relative")
    assert same.preference.accuracy == 0.5  # all ties
    with pytest.raises(gem.UserError, match="reference"):
        gem.evaluate(objects, PAIRS, preference_reduction="relative")


def test_calibrate_is_what_the_command_writes(folder, objects, tmp_path, same_state, monkeypatch, capsys):
    out = tmp_path / "score.json"
    command = ["calibrate", folder / "model", folder / "pairs.jsonl", "--out", out, "--max-completion-length", 6]
    code, _, err = call([*command, "--sample", 2], monkeypatch, capsys)
    assert code == 0, err
    written = read_score(out)
    found = gem.calibrate(objects, PAIRS, num_generations=2, max_completion_length=6)
    assert found.model_copy(update={"model": written.model}) == written
    with pytest.raises(gem.UserError, match="score_features"):
        gem.calibrate(objects, PAIRS, score_features=("nonsense",))


CUT_OFF = pytest.mark.filterwarnings("ignore:Warning. SEGA, step 1. every candidate was cut off:UserWarning")


@CUT_OFF
def test_train_from_memory_is_train_from_files(folder, objects, tmp_path, same_state, capsys):
    before = {name: value.clone() for name, value in objects[0].state_dict().items()}
    one = gem.train(folder / "model", folder / "pairs.jsonl", output_dir=tmp_path / "one", verbose=False, **RUN)
    rows = datasets.Dataset.from_list(PAIRS)
    two = gem.train(objects, pairs=rows, output_dir=str(tmp_path / "two"), verbose=False, **RUN)
    assert capsys.readouterr().out == ""
    weights = [(result.model_dir / "model.safetensors").read_bytes() for result in (one, two)]
    assert weights[0] == weights[1] and two.evaluations["SEGA"].preference == one.evaluations["SEGA"].preference
    assert all(torch.equal(value, before[name]) for name, value in objects[0].state_dict().items())
    assert all(module.training for module in objects[0].modules())
    assert [json.loads(line) for line in (tmp_path / "two.pairs.jsonl").read_text().splitlines()] == PAIRS
    for result in (one, two):
        assert result.page == result.run_dir / "report.html" and "<html" in result.page.read_text()
        assert read_completions(result.run_dir / "completions.jsonl")[0].tokens is not None


@CUT_OFF
def test_train_says_where_the_objective_was_not_kept(folder, tmp_path, monkeypatch, capsys):
    """In silence by Python's warnings; else by the lines and the table of the command."""
    path = folder / "model"
    with pytest.warns(UserWarning, match="gate: SEGA is not run, because its score is not shown"):
        made = gem.train(path, PAIRS, output_dir=tmp_path / "gate", verbose=False, **{**RUN, "gate": "stop"})
    assert made.saved == "start" and made.evaluations[made.saved].preference.num_pairs
    monkeypatch.setattr(Change, "fell", True)
    with pytest.warns(UserWarning, match="keep_best: .*: the model at the start is saved"):
        made = gem.train(path, PAIRS, output_dir=tmp_path / "best", verbose=False, keep_best=True, **RUN)
    assert made.saved == "start" and capsys.readouterr() == ("", "")
    made = gem.train(path, PAIRS, output_dir=tmp_path / "loud", keep_best=True, **RUN)
    out = capsys.readouterr().out
    assert "preference accuracy" in out and f"Run: {made.run_dir} (model/ of start" in out and "keep_best: " in out


@pytest.mark.parametrize(("level", "told"), [("warning", True), ("error", False)])
def test_no_level_leaves_out_what_a_run_came_to(level, told, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Change, "fell", True)
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": tmp_path / "run"}
    flags = [word for key, value in {**RUN, "keep_best": True, **paths}.items() for word in (f"--{key}", value)]
    code, dry, _ = call(["--log-level", level, "train", *flags, "--dry-run"], monkeypatch, capsys)
    assert code == 0 and "Loading" not in dry and "Dry run: every check" in dry
    code, out, _ = call(["--log-level", level, "train", *flags], monkeypatch, capsys)
    set_level("info")
    assert code == 0 and "Loading" not in out and ("keep_best: " in out) is told
    assert "preference accuracy" in out and f"Run: {tmp_path}/run (model/ of start" in out and "Page: " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": -1}, "learning_rate: expected at least 0"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"train_file": "x"}, "train_file: give it as pairs"),
        ({"pairs": {"train": PAIRS}}, "give one split of it"),
        ({"pairs": [*PAIRS, "x"]}, "pairs row 6: expected a dictionary, got str"),
        ({"pairs": [{"prompt": object()}]}, "pairs row 0: not text and numbers"),
        ({"pairs": [{"prompt": "?"}] * 3}, 'the key "chosen" is missing'),
        ({"pairs": 3}, "expected rows"),
        ({"model": 3}, "expected a name"),
        ({"model": ("a", "b")}, "got (str, str)"),
    ],
)
def test_a_mistake_is_one_error_and_leaves_nothing(folder, objects, tmp_path, arguments, words):
    arguments = {"model": objects, "pairs": PAIRS, **RUN, **arguments}
    with pytest.raises(gem.UserError) as error:
        gem.train(output_dir=tmp_path / "run", verbose=False, **arguments)
    assert words in str(error.value) and not list(tmp_path.iterdir())


def test_what_is_beside_a_run_is_not_overwritten(folder, tmp_path):
    (tmp_path / "run.pairs.jsonl").write_text("mine")
    with pytest.raises(gem.UserError, match="holds other rows"):
        gem.train(folder / "model", PAIRS, output_dir=tmp_path / "run", verbose=False, **RUN)
    assert (tmp_path / "run.pairs.jsonl").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: gem.score(model, PAIRS, num_generation=2), "did you mean 'num_generations'"),
        (lambda model: gem.score(model, PAIRS, batch_size=0), "batch_size: expected at least 1"),
        (lambda model: gem.score(model, [{"prompt": "?"}]), "data row 0: no answer to score"),
        (lambda model: gem.generate(model, " "), "prompt: "),
        (lambda model: gem.generate(model, [{"role": "user"}]), "prompt: "),
        (lambda model: gem.generate(model, ["1?", "2?"]), "got list; several prompts are rows of gem.score"),
        (lambda model: gem.generate(model, None), "prompt: expected one question as text, or the messages of one chat"),
        (lambda model: gem.generate(model, 3), "[{'role': 'user', 'content': ...}], got int"),
        (lambda model: gem.generate(model, "?", temperature=-1), "temperature: expected at least 0"),
        (lambda model: gem.score(model, PAIRS, best=True), "--sample 8 (Python: num_generations=8)"),
        (lambda model: gem.evaluate(model, []), "no pairs in it"),
        (lambda model: gem.evaluate(model, PAIRS, preference_reduction="relative"), "reference: expected the model"),
        (
            lambda model: gem.calibrate(model, PAIRS, held_out=PAIRS, num_generations=0),
            "held_out: expected num_generations of at least 1 with it, got 0",
        ),
        (
            lambda model: gem.calibrate(model, PAIRS, calibrate_on="candidates", num_generations=1),
            "calibrate_on: candidates: expected num_generations of at least 2 with it, got 1",
        ),
        (lambda model: gem.evaluate("no/such/model", PAIRS), "no such file or directory"),
    ],
)
def test_arguments_are_checked_as_flags_are(objects, call, words):
    with pytest.raises(gem.UserError) as error:
        call(objects)
    assert words in str(error.value)


def test_a_page_that_fails_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "write_report", lambda *_: 1 / 0)
    assert write_page(tmp_path, Console()) is None
    assert capsys.readouterr().out == "Page: not written: division by zero\n"


def test_agreement_is_a_share_of_equal_answers(objects):
    settings = {"num_generations": 4, "max_completion_length": 3, "answer_span": "last_tokens:1", "temperature": 0.3}
    rows = gem.score(objects, [{"prompt": "1 + 1?"}], **settings)
    (best,) = gem.score(objects, [{"prompt": "1 + 1?"}], best=True, **settings)
    answers = [normalize_answer(row["final_answer"]) for row in rows if row["final_answer"] is not None]
    assert best["agreement"] == answers.count(normalize_answer(best["final_answer"])) / 4
