"""Rejection sampling: which candidate is picked, and what a step on it is; and the weights that a run keeps."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gem import loop
from gem.config.read import build_config
from gem.config.settings import Scoring
from gem.data.batches import TokenizedPair
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.loop import train
from gem.model.forward import Policy, completion_stats
from gem.rollout.sample import given_completions
from gem.run import save_points
from gem.run.keep_best import changes
from gem.scoring.score import score_rollout
from gem.update.rejection import best_of_each, choose_winners, rejection_metrics
from gem.update.sft import sft_step
from tests.helpers import END, FORM, Recorder, encode, save_tiny, tiny_model


def scored_of(answers, scores, *, ended=None, valid=None):
    """P x G candidates that give these answers (None: none) and have these scores."""
    flat = [answer for row in answers for answer in row]
    ended = [True] * len(flat) if ended is None else ended
    texts = ["hm" if answer is None else f"so\nFinal Answer: {answer}" for answer in flat]
    rows = [(*encode(text), *([END] if end else [])) for text, end in zip(texts, ended)]
    rollout = given_completions(FORM, [encode(f"question {i}") for i in range(len(answers))], rows)
    scored = score_rollout(Policy(tiny_model()), rollout, Scoring(), batch_size=2)
    kept = torch.tensor([True] * len(flat) if valid is None else valid)
    return dataclasses.replace(
        scored,
        scores=dataclasses.replace(scored.scores, valid=kept, score=torch.tensor([s for row in scores for s in row])),
    )


def test_the_best_of_each_prompt_that_counts_is_picked():
    answers, scores = [["1", "2", None]] * 3, [[1.0, 3.0, 2.0]] * 3
    picked = best_of_each(scored_of(answers, scores))
    assert [pick.row for pick in picked] == [1, 4, 7]
    ended = [True, False, True] + [True] * 3 + [False] * 3
    valid = [True] * 4 + [False] * 2 + [True] * 3
    picked = best_of_each(scored_of(answers, scores, ended=ended, valid=valid))
    assert [pick.row for pick in picked] == [2, 3]  # of the third prompt none has ended


def test_its_agreement_is_the_share_of_the_votes_for_its_answer_weighted_by_score():
    scored = scored_of([["1", "1 ", "2", None, "1"]], [[0.0, 2.0, 1.0, -1.0, 0.5]], ended=[True] * 4 + [False])
    (found,) = best_of_each(scored)
    e = [math.exp(x) for x in (0.0, 2.0, 1.0, -1.0, 0.5)]
    assert found.row == 1 and found.agreement == pytest.approx((e[0] + e[1]) / sum(e))
    (found,) = best_of_each(scored_of([[None, "1"]], [[1.0, 0.0]]))
    assert found.row == 0 and found.agreement == 0.0  # an answer that is not found agrees with nothing


def test_below_one_the_agreed_prompts_alone_are_learned():
    answers, scores = (
        [["1", "2", "3"], ["4", "4", "5"], ["6", "6", "6"]],
        [[0.0, 0.0, 0.1], [0.1, 0.2, 0.3], [0.0, 0.2, 0.1]],
    )
    scored = scored_of(answers, scores)
    assert [winner.row for winner in choose_winners(scored, 0.5)] == [4, 7]  # not row 5, of the highest score
    assert [winner.row for winner in best_of_each(scored)] == [2, 5, 7]


def test_a_step_is_sft_on_the_picked():
    scored = scored_of([["1", "2"], ["3", None]], [[1.0, 0.0], [0.0, 1.0]])
    model = tiny_model()
    trainer = Recorder(model, micro_batch_size=1)
    winners = best_of_each(scored)
    result = sft_step(trainer, [winner.pair for winner in winners], pad_id=FORM.pad_id)
    got = trainer.gradient
    rows = [0, 3]
    stats = completion_stats(Policy(model), scored.rollout.batch).logprobs[rows]
    number = int(scored.rollout.batch.lengths[rows].sum())
    loss = -stats.sum() / number
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5) and result.num_tokens == number
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    metrics = rejection_metrics(scored, winners)
    assert metrics["rejection/picked"] == 1.0
    assert metrics["rejection/agreement"] == pytest.approx(math.e / (1 + math.e) / 2)
    assert rejection_metrics(scored, []) == {"rejection/picked": 0.0}


# A run, and the weights that it keeps.

# Long enough that some of the tiny model's candidates end.
RUN = {
    "num_generations": 6, "max_completion_length": 48, "max_steps": 2, "prompts_per_step": 3, "micro_batch_size": 2,
    "sft_epochs": 2, "sft_batch_size": 4, "sft_learning_rate": 1e-2, "learning_rate": 1e-3, "eval_generate": 0,
    "eval_sample": 3, "system_prompt": "", "device": "cpu", "gate": "off", "objective": "rejection_sampling",
    "eval_fraction": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rejection")
    save_tiny(folder / "model")
    rows = arithmetic_pairs(12)
    write_jsonl(folder / "pairs.jsonl", rows)
    write_jsonl(folder / "unknown.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    return folder


def run(folder, name, data="pairs", resume=False, **more):
    paths = {"model": folder / "model", "train_file": folder / f"{data}.jsonl", "output_dir": folder / name}
    config = build_config({**RUN, **{key: str(path) for key, path in paths.items()}, **more})
    console = Console(file=io.StringIO(), width=400)
    return train(config, console, resume=resume), console.file.getvalue()


def rows_of(result):
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(result):
    return (result.model_dir / "model.safetensors").read_bytes()


def test_a_run_samples_picks_and_learns(folder):
    """Six prompts are sampled once, by SFT's policy; the winners are learnt in two passes of batches of three."""
    result, _ = run(folder, "plain", score="calibrated", log_completions_steps=5)
    steps = [row for row in rows_of(result) if row["stage"] == "rejection sampling"]
    number = round(steps[0]["rejection/picked"] * 6)
    assert 1 <= number <= 6 and len(steps) == 2 * -(-number // 3) and result.saved == "rejection sampling"
    assert "gem/score" in steps[0] and "gem/score" not in steps[1]
    assert all(row["loss"] > 0 for row in steps)
    rows = (result.run_dir / "completions.jsonl").read_text().splitlines()
    assert len(rows) == 6 * RUN["num_generations"]
    assert not (result.run_dir / "before-objective").exists()


def test_no_guard_judges_the_candidates_that_sft_made(folder):
    """They were sampled before the first step, which `stop` ended the run after."""
    result, printed = run(folder, "guarded", guards="stop", guard_h_final=1e3)
    steps = [row for row in rows_of(result) if row["stage"] == "rejection sampling"]
    assert steps[0]["gem/h_final"] < 1e3 and len(steps) > 1 and "Guard" not in printed


def tensors(directory):
    return load_file(directory / "model.safetensors")


def test_the_mean_with_the_weights_before(folder):
    before, _ = run(folder, "before", max_steps=0)
    after, _ = run(folder, "after")
    mean, _ = run(folder, "mean", start_weight=0.25)
    one, two, got = (tensors(result.model_dir) for result in (before, after, mean))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    for name in one:
        torch.testing.assert_close(got[name], 0.25 * one[name] + 0.75 * two[name])


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(folder, monkeypatch, stop):
    """Cut off after so many optimizer steps, the last of SFT's or one in between: winners are not drawn again."""
    more = {"start_weight": 0.5, "save_steps": 1, "log_completions_steps": 1}
    whole, _ = run(folder, f"whole-{stop}", **more)
    real = save_points.save

    def save_and_stop(session, state, stage_state, needs):
        real(session, state, stage_state, needs)
        if state.total_steps == len(sft_steps) + stop - 3:
            raise KeyboardInterrupt

    sft_steps = [row for row in rows_of(whole) if row["stage"] == "SFT"]
    monkeypatch.setattr(save_points, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, f"cut-{stop}", **more)
    monkeypatch.setattr(save_points, "save", real)
    resumed, _ = run(folder, f"cut-{stop}", resume=True, **more)
    assert weights(resumed) == weights(whole)
    assert (resumed.run_dir / "completions.jsonl").read_text() == (whole.run_dir / "completions.jsonl").read_text()


def test_candidates_of_prompts_without_answers(folder):
    path = folder / "prompts.jsonl"
    write_jsonl(path, [{"prompt": row["prompt"]} for row in arithmetic_pairs(20, seed=3)[:4]])
    result, _ = run(folder, "prompts", prompts_file=str(path), log_completions_steps=1)
    texts = [json.loads(line)["prompt"] for line in (result.run_dir / "completions.jsonl").read_text().splitlines()]
    assert len(texts) == 4 * RUN["num_generations"]
    for row in arithmetic_pairs(20, seed=3)[:4]:
        assert any(row["prompt"] in text for text in texts)
    (folder / "empty.jsonl").write_text('{"question": "1 + 1?"}\n')
    with pytest.raises(UserError, match=r'empty.jsonl:1: the key "prompt" is missing: each line needs it'):
        run(folder, "none", prompts_file=str(folder / "empty.jsonl"))
    assert not (folder / "none").exists()


def fall(monkeypatch, value, field="sampled_rates"):
    """The evaluation after the objective finds this accuracy on every problem, the one before 0.5."""

    def fake(session, state, name, linear=None, real=loop.run_evaluation):
        found = real(session, state, name, linear)
        here = 0.5 if name == "SFT" else value
        return dataclasses.replace(found, **{field: torch.full((3,), here, dtype=torch.float64)})

    monkeypatch.setattr(loop, "run_evaluation", fake)


def test_the_weights_of_sft_are_saved_where_accuracy_fell(folder, monkeypatch):
    only, _ = run(folder, "sft", max_steps=0)
    trained, _ = run(folder, "trained")
    fall(monkeypatch, 0.25)
    result, printed = run(folder, "fell", keep_best=True)
    assert weights(result) == weights(only) != weights(trained) and result.saved == "SFT"
    line = "sampled accuracy 0.500 -> 0.250 (difference -0.250 [-0.250, -0.250], 3 cases): the model after SFT is saved"
    assert f"keep_best: {line}" in printed
    row = rows_of(result)[-1]
    assert row["stage"] == "guard" and row["guards"] == ["keep_best"] and row["done"] == line
    assert not (result.run_dir / "before-objective").exists()
    report = Console(file=io.StringIO(), width=400)
    loop.report(result, report)
    assert "(model/ of SFT, metrics.jsonl" in report.file.getvalue()
    for value in (0.5, 0.75):
        fall(monkeypatch, value)
        result, printed = run(folder, f"kept-{value}", keep_best=True)
        assert weights(result) == weights(trained) and "the model after rejection sampling is saved" in printed
        assert all(row["stage"] != "guard" for row in rows_of(result))


def test_without_known_answers_preference_and_score_decide(folder, monkeypatch):
    trained, _ = run(folder, "unknown", data="unknown", score="calibrated", keep_best=True)
    after, before = trained.evaluations["rejection sampling"], trained.evaluations["SFT"]
    assert before.sampled_rates is None and before.score_wins is not None

    class Here:
        config = build_config({"model": "m", "train_file": "t", "output_dir": "o"})
        eval_pairs = None

    Here.eval_pairs = [TokenizedPair(encode(f"q{i}"), (1, 2), (3, 4), None) for i in range(3)]
    found = changes(Here, before, after)
    assert [change.name for change in found] == ["preference accuracy", "pair accuracy of the score"]
    assert found[0].before == pytest.approx(before.preference.accuracy)
    assert found[0].after == pytest.approx(after.preference.accuracy)
    assert found[1].after == pytest.approx(after.score.value)
    assert found[1].fell == (after.score.value < before.score.value - 1e-9)
