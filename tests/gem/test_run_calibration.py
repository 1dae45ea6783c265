"""The score within a run: fitted between SFT and the objective, tested, gated, saved, and continued to the bit."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from gem.calibration import measure
from gem.calibration.features import FEATURES
from gem.calibration.fit import calibrate
from gem.calibration.measure import calibrate_policy
from gem.calibration.score_file import read_score, write_score
from gem.calibration.verdict import PairFeatures
from gem.config.read import build_config
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.run import calibration
from gem.run.guards import Baseline, breaches, next_baseline
from tests.helpers import save_tiny

RUN = {
    "num_generations": 2, "max_completion_length": 6, "max_steps": 4, "prompts_per_step": 2, "micro_batch_size": 2,
    "sft_epochs": 1, "sft_batch_size": 8, "sft_learning_rate": 3e-3, "learning_rate": 1e-3, "eval_generate": 0,
    "eval_sample": 2, "system_prompt": "", "device": "cpu", "calibration_pairs": 12, "score": "calibrated",
    "gate": "off", "eval_fraction": 0.25,
}  # fmt: skip
TIMES = ("step_time", "eval/seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    save_tiny(folder / "model")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(20))
    return folder


def run(folder, name, resume=False, **more):
    """(result, what was printed)."""
    paths = {"model": folder / "model", "train_file": folder / "pairs.jsonl", "output_dir": folder / name}
    config = build_config({**RUN, **{key: str(path) for key, path in paths.items()}, **more})
    console = Console(file=io.StringIO(), width=400)
    return train(config, console, resume=resume), console.file.getvalue()


def rows(result):
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def weights(result):
    return (result.model_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def again(folder):
    """Recalibrated after two of four steps, with a checkpoint at every step."""
    return run(folder, "again", recalibrate_steps=2, save_steps=1, save_total_limit=99)[0]


def test_the_score_is_fitted_after_sft_and_again_and_is_what_candidates_are_scored_with(again):
    found = rows(again)
    stages = [row["stage"] for row in found]
    assert stages == [
        *["eval", "SFT", "SFT", "eval", "calibration"],
        *["SEGA"] * 2,
        "calibration",
        *["SEGA"] * 2,
        "eval",
    ]
    first, second = (row for row in found if row["stage"] == "calibration")
    assert (first["step"], second["step"]) == (0, 2) and first["weights"] != second["weights"]
    assert first["num_pairs"] == 12 and first["verdict"] in ("informative", "not_informative", "explained_by_length")
    assert 0 <= first["pair_accuracy_low"] <= first["pair_accuracy"] <= first["pair_accuracy_high"] <= 1
    assert 0 <= first["eval/score_pair_accuracy"] <= 1 and first["scales_from"] in ("candidates", "pairs")
    assert first["fitted_to"] in ("candidates", "pairs")
    names = sorted(path.name for path in again.run_dir.glob("score*"))
    assert names == ["score-2.json", "score-4.json", "score.json"]
    score = read_score(again.run_dir / "score.json")
    assert score == read_score(again.run_dir / "score-4.json") and score.weights == second["weights"]
    assert read_score(again.run_dir / "score-2.json").weights == first["weights"]
    step = next(row for row in found if row["stage"] == "SEGA")
    assert step["gem/score"] != pytest.approx(step["gem/h_fork"] - step["gem/h_final"], rel=1e-3)
    assert again.evaluations["SEGA"].score.count == 5 and again.evaluations["start"].score is None


@pytest.mark.parametrize("keep", [2, 3, 4])
def test_a_run_continued_from_any_checkpoint_is_the_same_to_the_bit(folder, again, keep, tmp_path):
    """After SFT (the score is fitted anew), between the two scores (it is in the checkpoint), and after the second."""
    name = f"cut-{keep}"
    shutil.copytree(again.run_dir, folder / name)
    shutil.rmtree(folder / name / "model")
    for path in (folder / name).glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > keep:
            shutil.rmtree(path)
    for path in (folder / name).glob("score*"):
        path.unlink()
    config = (folder / name / "config.yaml").read_text().replace(str(again.run_dir), str(folder / name))
    (folder / name / "config.yaml").write_text(config)
    result, _ = run(folder, name, resume=True, recalibrate_steps=2, save_steps=1, save_total_limit=99)
    assert rows(result) == rows(again) and weights(result) == weights(again)
    assert result.evaluations["SFT"].score == again.evaluations["SFT"].score
    last = folder / name / "score-4.json"
    assert last.exists() == (keep < 4)
    if last.exists():
        old = read_score(again.run_dir / "score-4.json").model_dump()
        assert {**read_score(last).model_dump(), "model": old["model"]} == old


def verdict_of(kind, monkeypatch):
    """Every fit comes to this verdict."""

    def fake(*arguments, real=measure.calibrate_policy, **more):
        fitted = real(*arguments, **more)
        return dataclasses.replace(fitted, verdict=fitted.verdict.model_copy(update={"kind": kind}))

    monkeypatch.setattr(calibration, "calibrate_policy", fake)


@pytest.mark.parametrize("kind", ["not_informative", "explained_by_length"])
def test_the_gate_ends_the_run_after_sft_with_its_model(folder, kind, monkeypatch):
    verdict_of(kind, monkeypatch)
    result, printed = run(folder, f"stop-{kind}", gate="stop", eval_on_start=False, eval_sample=1)
    before, after = result.evaluations.values()
    assert before.sampled is None and before.preference.num_pairs == 5 and after.sampled is not None
    found = rows(result)
    assert [row["stage"] for row in found] == ["eval", "SFT", "SFT", "eval", "calibration"]
    assert found[-1]["done"] == "SEGA is not run"
    (line,) = [line for line in printed.splitlines() if line.startswith("gate: ")]
    assert "SEGA is not run" in line and ("length" in line) == (kind == "explained_by_length")
    only, _ = run(folder, f"only-sft-{kind}", max_steps=0)
    assert weights(result) == weights(only)


def pairs_that_say_all(*arguments, real=calibrate_policy, **options):
    """Of the given pairs every score is informative."""
    fitted = real(*arguments, **options)
    verdict = fitted.verdict.model_copy(update={"kind": "informative", "words": "Informative, strong. 0.92."})
    return dataclasses.replace(fitted, verdict=verdict, own=None)


@pytest.mark.parametrize(("more", "judged"), [({}, True), ({"sft_epochs": 0}, False)])
def test_a_score_fitted_to_pairs_that_sft_has_seen_is_judged_by_others(folder, monkeypatch, more, judged):
    """Unless there was no SFT."""
    monkeypatch.setattr(calibration, "calibrate_policy", pairs_that_say_all)
    monkeypatch.setattr(calibration, "held_out_features", held_out_pairs)
    result, printed = run(folder, f"seen-{judged}", gate="stop", max_steps=1, **more)
    (row,) = [row for row in rows(result) if row["stage"] == "calibration"]
    score = read_score(result.run_dir / "score.json")
    assert row["verdict"] == score.verdict.kind == ("not_informative" if judged else "informative")
    assert row["words"] == score.verdict.words and ("SEGA" in result.evaluations) != judged
    assert ("of 32 held-out pairs" in row["words"]) == judged and printed.count(" of 32") == 1


def held_out_pairs(session):
    """32 of which no score knows anything: each stands there both ways round."""
    one, other = np.random.default_rng(0).normal(size=(2, 16, 9))
    return PairFeatures(np.concatenate([one, other]), np.concatenate([other, one]), list(range(32)))


def test_a_score_fitted_to_own_answers_is_judged_by_these_and_by_others(folder, monkeypatch):
    """Not by the given pairs, where SFT has trained on their chosen answers."""

    def fake(given, candidates, own, **options):
        clear, rest = np.zeros((12, 9)), np.zeros((12, 9))
        clear[:, 3] = 1.0
        own = PairFeatures(*np.random.default_rng(1).normal(size=(2, 12, 9)), list(range(12)))
        given = PairFeatures(clear + own.chosen, rest + own.chosen, [f"given {i}" for i in range(12)])
        options = {key: value for key, value in options.items() if key != "fit_to"}
        return calibrate(own.chosen, own.rejected, own.prompts, given=given, **options)

    monkeypatch.setattr(calibration, "calibrate_policy", fake)
    monkeypatch.setattr(calibration, "held_out_features", held_out_pairs)
    for epochs, number in ((1, 44), (0, 24)):
        result, _ = run(folder, f"own-{epochs}", gate="stop", max_steps=1, sft_epochs=epochs)
        (row,) = [row for row in rows(result) if row["stage"] == "calibration"]
        words = read_score(result.run_dir / "score.json").verdict.words
        assert row["words"] == words and f"{number} pairs" in words and "(12 of them a right" in words
        assert ("neither it nor SFT" in words) == (epochs == 1)


def test_the_gate_warns_or_is_silent_and_lets_an_informative_score_pass(folder, monkeypatch):
    verdict_of("not_informative", monkeypatch)
    result, printed = run(folder, "warn", gate="warn")
    assert "Warning: the score is not shown to be informative" in printed and "SEGA" in result.evaluations
    _, printed = run(folder, "silent", gate="off")
    assert "is not shown to be informative" not in printed
    verdict_of("informative", monkeypatch)
    result, printed = run(folder, "pass", gate="stop")
    assert "SEGA" in result.evaluations and "gate:" not in printed


def test_the_gate_ends_the_objective_where_the_score_stops_being_informative(folder, monkeypatch):
    kinds = iter(["informative", "not_informative"])

    def fake(*arguments, real=measure.calibrate_policy, **more):
        fitted = real(*arguments, **more)
        return dataclasses.replace(fitted, verdict=fitted.verdict.model_copy(update={"kind": next(kinds)}))

    monkeypatch.setattr(calibration, "calibrate_policy", fake)
    result, printed = run(folder, "ends", gate="stop", recalibrate_steps=2)
    assert [row["stage"] for row in rows(result)][-4:] == ["SEGA", "SEGA", "calibration", "eval"]
    assert "SEGA ends after 2 steps" in printed


def test_the_papers_score_is_tested_too_and_trains_as_without_the_test(folder):
    tested, printed = run(folder, "paper", score="paper", gate="warn")
    plain, silent = run(folder, "plain", score="paper", gate="off")
    (row,) = [row for row in rows(tested) if row["stage"] == "calibration"]
    assert row["score"] == "paper" and row["num_pairs"] == 12 and "weights" not in row
    assert ("Warning" in printed) == (row["verdict"] != "informative") and "Calibration" not in silent
    assert [r for r in rows(tested) if r["stage"] != "calibration"] == rows(plain)
    assert weights(tested) == weights(plain) and not list(tested.run_dir.glob("score*"))


def a_score(path, top_m=0.1):
    rng = np.random.default_rng(0)
    better, worse = rng.normal(size=(2, 20, 9))
    better[:, FEATURES.index("length")] += 1
    fitted = calibrate(better, worse, range(20), features=["length"])
    return write_score(fitted.score(model="m", pairs_hash="h", top_m=top_m), path)


@pytest.mark.parametrize(
    ("epochs", "words"), [(0, "that the score may have been fitted to"), (1, "SFT has trained on")]
)
def test_a_score_from_a_file_may_have_been_fitted_to_these_pairs(folder, tmp_path, monkeypatch, epochs, words):
    """So held-out pairs decide, and where there are too few a line says so."""

    def fake(*arguments, real=calibration.fixed_score_verdict, **options):
        found, verdict = real(*arguments, **options)
        return found, verdict.model_copy(update={"kind": "informative", "words": "Informative, strong. 0.92."})

    monkeypatch.setattr(calibration, "fixed_score_verdict", fake)
    more = {"score": str(a_score(tmp_path / "s.json")), "gate": "stop", "max_steps": 1, "sft_epochs": epochs}
    few, _ = run(folder, f"few-{epochs}", **more)
    (row,) = [row for row in rows(few) if row["stage"] == "calibration"]
    assert row["verdict"] == "informative" and words in row["words"] and "of at least 16 other pairs" in row["words"]
    monkeypatch.setattr(calibration, "held_out_features", held_out_pairs)
    enough, _ = run(folder, f"enough-{epochs}", **more)
    (row,) = [row for row in rows(enough) if row["stage"] == "calibration"]
    assert row["verdict"] == "not_informative" and "of 32 held-out pairs" in row["words"]
    assert "SEGA" in few.evaluations and "SEGA" not in enough.evaluations


def test_a_file_gives_the_score(folder, tmp_path):
    path = a_score(tmp_path / "s.json")
    result, _ = run(folder, "file", score=str(path), gate="warn", save_steps=2)
    (name,), (weight,) = read_score(path).linear
    for row in rows(result):
        if row["stage"] == "SEGA":
            assert name == "length" and row["gem/score"] == pytest.approx(
                weight * row["completions/mean_length"], rel=1e-4
            )
    assert result.evaluations["start"].score is not None
    assert read_score(result.run_dir / "score.json") == read_score(path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"score": "missing.json"}, "expected paper, calibrated or a score.json"),
        ({"score": "TOP"}, "top_m: 3"),
        ({"score_features": "entropy"}, "score_features: expected .*got 'entropy'"),
        ({"score_features": "length,length"}, "given twice"),
        ({"score": "paper", "recalibrate_steps": 2}, "recalibrate_steps"),
        ({"calibration_generations": 1}, "calibration_generations"),
        ({"guards": "lower_fork_weight"}, "lower_fork_weight"),
        ({"train_file": "ONE"}, "at least 2 prompts"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(folder, more, words, tmp_path):
    if more.get("score") == "TOP":
        more = {"score": str(a_score(tmp_path / "s.json", top_m=3))}
    if more.get("train_file") == "ONE":
        write_jsonl(tmp_path / "one.jsonl", arithmetic_pairs(1))
        more = {"train_file": str(tmp_path / "one.jsonl"), "eval_file": str(folder / "pairs.jsonl"),
                "eval_split": "train"}  # fmt: skip
    with pytest.raises(UserError, match=words) as error:
        run(folder, "never", **more)
    assert "\n" not in str(error.value) and not (folder / "never").exists()


def test_another_score_in_the_file_is_no_continuation(folder, tmp_path):
    path = a_score(tmp_path / "s.json")
    result, _ = run(folder, "swapped", score=str(path), save_steps=2)
    shutil.rmtree(result.model_dir)
    content = json.loads(path.read_text())
    content["weights"]["length"] += 1.0
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no longer holds the score"):
        run(folder, "swapped", resume=True, score=str(path), save_steps=2)


def test_the_settings_name_the_features_there_are():
    from gem.config.section import CHOICES

    assert CHOICES["score_features"] == FEATURES


def test_the_guard_watches_the_score():
    limits = build_config({"model": "m", "train_file": "t", "output_dir": "o", "guard_score_drop": 0.2})
    start = next_baseline({"eval/score_pair_accuracy": 0.8}, Baseline())
    assert start.best_score == 0.8
    assert breaches({"eval/score_pair_accuracy": 0.61}, start, limits) == []
    (breach,) = breaches({"eval/score_pair_accuracy": 0.59}, start, limits)
    assert breach.guard == "score" and breach.limit == pytest.approx(0.6)
    assert next_baseline({"eval/score_pair_accuracy": 0.7}, start).best_score == 0.8


def test_the_same_numbers_for_any_micro_batch(folder, again):
    other, _ = run(folder, "micro", recalibrate_steps=2, eval_batch_size=3)
    one, two = (next(r for r in rows(x) if r["stage"] == "calibration") for x in (again, other))
    for name, value in one["weights"].items():
        assert two["weights"][name] == pytest.approx(value, rel=1e-2, abs=1e-3)
    assert torch.equal(again.evaluations["SFT"].score_wins, other.evaluations["SFT"].score_wins)
