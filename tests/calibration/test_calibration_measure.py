"""Features of given pairs and of the model's own candidates, the scales these give, and `gem calibrate` as a whole."""

import dataclasses
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from gem import cli
from gem.calibration.features import DEFAULT_FEATURES, FEATURES
from gem.calibration.fit import calibrate, candidate_scales
from gem.calibration.measure import (
    calibrate_policy,
    candidate_features,
    candidate_scores,
    correct_answers,
    measure_samples,
    own_candidates,
    pair_features,
    pairs_hash,
    prompts_to_sample,
    right_and_wrong,
)
from gem.calibration.score_file import read_score
from gem.calibration.verdict import PairFeatures, fixed_score_verdict
from gem.config.settings import SCORE_FEATURES, Sampling, Scoring
from gem.data.batches import TokenizedPair
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.model.forward import Policy, completion_stats
from gem.model.opened import OpenedModel
from gem.rollout.sample import given_completions
from gem.scoring.score import rank_candidates
from tests.helpers import END, FORM, encode, save_tiny, tiny_model

COLUMNS = [FEATURES.index(name) for name in DEFAULT_FEATURES]
TEXTS = ("2 + 2 = 4\nFinal Answer: 4", "Final Answer: 5", "so it is\nFinal Answer: 12", "x\nFinal Answer: 1", "no")


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model())


def pairs_of(number, answer="4"):
    def ids(i):
        return (*encode(TEXTS[i % len(TEXTS)] + "!" * (i % 3)), END)

    return [TokenizedPair(encode(f"question {i}" + "?" * (i % 4)), ids(i), ids(i + 1), answer) for i in range(number)]


def test_features_are_those_of_each_answer_alone_in_the_order_of_the_pairs(policy):
    pairs = pairs_of(6)
    found = pair_features(policy, FORM, pairs, Scoring(), batch_size=4)
    assert found.prompts == [pair.prompt_ids for pair in pairs] and found.chosen.shape == (6, 9)
    for pair, chosen, rejected in zip(pairs, found.chosen, found.rejected):
        for ids, row in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
            alone = given_completions(FORM, [pair.prompt_ids], [ids])
            with torch.no_grad():
                stats = completion_stats(policy, alone.batch)
            logprobs, entropy = stats.logprobs[0].double(), stats.entropy[0].double()
            start = int(alone.spans.answer_start[0])
            start = start if 0 <= start < len(ids) else 4 * len(ids) // 5
            expected = {
                "final_entropy": entropy[start:].mean(), "mean_logprob": logprobs.mean(),
                "sum_logprob": logprobs.sum(), "min_logprob": logprobs.min(), "max_entropy": entropy.max(),
                "length": len(ids),
            }  # fmt: skip
            for name, value in expected.items():
                assert row[FEATURES.index(name)] == pytest.approx(float(value), rel=1e-4), name


def test_pairs_whose_answer_is_not_found_are_left_out_as_candidates_would_be(policy):
    pairs = pairs_of(6)
    found = pair_features(policy, FORM, pairs, Scoring(no_answer="exclude"), batch_size=4)
    assert found.prompts == [pairs[i].prompt_ids for i in (0, 1, 2, 5)]  # "no" holds no answer
    with pytest.raises(UserError, match="no_answer: tail"):
        pair_features(policy, FORM, pairs[3:5], Scoring(no_answer="exclude"), batch_size=4)
    with pytest.raises(UserError, match="at least one"):
        pair_features(policy, FORM, [], Scoring(), batch_size=4)


def test_scales_are_the_root_mean_square_difference_within_prompts():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 4, 9)) + 100 * rng.normal(size=(3, 1, 9))  # prompts differ far more than candidates
    values[..., 8] = 7.0
    valid = np.ones((3, 4), bool)
    valid[1, 2:] = valid[2] = False
    pairs = [(0, i, j) for i in range(4) for j in range(i)] + [(1, 0, 1)]
    expected = np.sqrt(np.mean([(values[p, i] - values[p, j]) ** 2 for p, i, j in pairs], axis=0))
    found = candidate_scales(values, valid)
    np.testing.assert_allclose(found[:8], expected[:8], rtol=1e-12)
    assert np.isinf(found[8])
    with pytest.raises(UserError, match="two valid candidates"):
        candidate_scales(values[2:], valid[2:])
    values[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        candidate_scales(values, valid)


def test_given_scales_take_the_place_of_those_of_the_pairs_in_every_fit():
    rng = np.random.default_rng(1)
    better, worse = rng.normal(size=(2, 40, 9))
    better[:, 5] += 1
    columns = [FEATURES.index(name) for name in DEFAULT_FEATURES]
    scales = np.linspace(0.5, 3, 9)
    fitted = calibrate(better, worse, range(40), scales=scales)
    plain = calibrate(better / scales, worse / scales, range(40), scales=np.ones(9))
    np.testing.assert_array_equal(fitted.scales, scales[columns])
    np.testing.assert_allclose(fitted.weights, plain.weights, rtol=1e-6)
    np.testing.assert_allclose(fitted.held_out, plain.held_out, rtol=1e-6)
    assert fitted.scales_from == "candidates" and calibrate(better, worse, range(40)).scales_from == "pairs"
    rest = np.arange(40) != 3
    other = calibrate(better[rest], worse[rest], range(39), scales=scales)
    np.testing.assert_allclose(fitted.held_out_weights[3], other.weights / other.scales, rtol=1e-6)
    with pytest.raises(UserError, match="9 numbers above 0"):
        calibrate(better, worse, range(40), scales=np.zeros(9))


def test_a_prompt_is_scored_without_its_own_pairs(policy):
    pairs = pairs_of(9)
    given = pair_features(policy, FORM, pairs, Scoring(), batch_size=4)
    prompts = [pairs[2].prompt_ids, encode("another")]
    sampling = Sampling(num_generations=3, max_completion_length=6)
    pool = own_candidates(policy, FORM, prompts, Scoring(), sampling, seed=0, batch_size=2)
    fitted = calibrate_policy(given, pool, features=DEFAULT_FEATURES)
    values, valid = candidate_features(pool)
    assert values.shape == (2, 3, 9) and valid.shape == (2, 3) and fitted.scales_from == "candidates"
    columns = [FEATURES.index(name) for name in DEFAULT_FEATURES]
    scores = candidate_scores(fitted, prompts, pool)
    np.testing.assert_allclose(scores[0], values[0][:, columns] @ fitted.held_out_weights[2])
    np.testing.assert_allclose(scores[1], values[1][:, columns] @ (fitted.weights / fitted.scales))
    assert measure_samples(scores, pool, [None, None]) == (None, None)
    truth = pool.rollout.spans.answers[3] or "4"
    samples, _ = measure_samples(scores, pool, [None, truth])
    assert samples.num_prompts == 1 and samples.num_generations == 3 and "calibrated" in samples.best_of


def test_a_prompt_with_many_own_pairs_weighs_as_one_with_few():
    rng = np.random.default_rng(5)
    better, worse = rng.normal(size=(2, 24, 9))
    better[:, 5] += 1
    given = PairFeatures(better, worse, list(range(24)))
    scales = np.ones(9)
    plain = calibrate(better, worse, range(24), scales=scales, given=given)
    # Four copies of the pairs of every third prompt.
    copies = np.concatenate([np.arange(24), *[np.arange(0, 24, 3)] * 3])
    fitted = calibrate(better[copies], worse[copies], copies.tolist(), scales=scales, given=given)
    np.testing.assert_allclose(fitted.weights, plain.weights, rtol=1e-6)
    np.testing.assert_allclose(fitted.held_out[:24], plain.held_out, rtol=1e-6)
    assert not np.allclose(
        calibrate(better[copies], worse[copies], copies.tolist(), scales=scales).weights, plain.weights
    )
    assert (plain.fitted_to, calibrate(better, worse, range(24)).fitted_to) == ("candidates", "pairs")


def test_a_score_of_own_candidates_is_tested_on_the_given_pairs_too_without_their_prompts():
    rng = np.random.default_rng(6)
    own, own_worse, better, worse = rng.normal(size=(4, 20, 9))
    own[:, 5] += 1
    better[:, 5] += 2
    given = PairFeatures(better, worse, list(range(10, 30)))  # ten prompts of both kinds
    fitted = calibrate(own, own_worse, range(20), given=given)
    names = [FEATURES.index(name) for name in DEFAULT_FEATURES]
    margins = (better - worse)[:, names] * fitted.unseen_weights(given.prompts)
    wins = np.concatenate([fitted.held_out, margins.sum(1)]) > 0
    assert fitted.pair_accuracy["calibrated"].value == pytest.approx(wins.mean())
    assert fitted.pair_accuracy["calibrated"].count == 40 and fitted.num_prompts == 30
    assert "40 pairs of 30 prompts it was not fitted on (20 of them a right and a wrong" in fitted.verdict.words
    unseen = fitted.unseen_weights([10, 29])
    rest = np.arange(20) != 10
    other = calibrate(own[rest], own_worse[rest], np.arange(20)[rest].tolist())
    np.testing.assert_allclose(unseen[0], other.weights / other.scales, rtol=1e-6)
    np.testing.assert_allclose(unseen[1], fitted.weights / fitted.scales)


def test_right_and_wrong_candidates_are_paired_within_their_prompt(policy):
    prompts = [encode("one"), encode("another"), encode("third")]
    texts = ["Final Answer: 4", "Final Answer: 5", "x\nFinal Answer: 4", "Final Answer: 5", "Final Answer: 7", "no"]
    texts += ["Final Answer: 4", "Final Answer: 4", "Final Answer: 5"]
    rollout = given_completions(FORM, prompts, [(*encode(text), END) for text in texts])
    with torch.no_grad():
        stats = completion_stats(policy, rollout.batch)
    scored = rank_candidates(rollout, stats.logprobs, stats.entropy, Scoring(), None)
    values, _ = candidate_features(scored)
    truths = ["4", "5", None]
    assert correct_answers(scored, truths).tolist() == [[True, False, True], [True, False, False], [False] * 3]
    found = right_and_wrong(scored, prompts, truths)
    assert found.prompts == [prompts[0]] * 2 + [prompts[1]] * 2
    np.testing.assert_array_equal(found.chosen, values[[0, 0, 1, 1], [0, 2, 0, 0]])
    np.testing.assert_array_equal(found.rejected, values[[0, 0, 1, 1], [1, 1, 1, 2]])
    assert right_and_wrong(scored, prompts, [None] * 3).chosen.shape == (0, 9)


@pytest.fixture
def made(policy):
    """(given pairs that prefer a high mean log-prob, candidates that give scales)."""
    rng = np.random.default_rng(7)
    better, worse = rng.normal(size=(2, 30, 9))
    better[:, 5] += 3
    prompts = [encode("one"), encode("another")]
    sampling = Sampling(num_generations=3, max_completion_length=6)
    pool = own_candidates(policy, FORM, prompts, Scoring(), sampling, seed=0, batch_size=2)
    return PairFeatures(better, worse, list(range(30))), pool, rng


def own_pairs(rng, number, column, sign):
    right, wrong = rng.normal(size=(2, 2 * number, 9))
    right[:, column] += sign * 3
    return PairFeatures(right, wrong, [100 + i // 2 for i in range(2 * number)])


def test_auto_takes_the_models_own_answers_unless_the_pairs_are_clearly_better(made):
    given, pool, rng = made
    fit = partial(calibrate_policy, given, pool, features=DEFAULT_FEATURES)
    other = own_pairs(
        rng, 12, 3, -1
    )  # its right answers have a low mean entropy, which the given pairs know nothing of
    assert fit(other).fitted_to == "candidates" and fit(other).weights[2] < -0.1
    assert fit(other, fit_to="pairs").fitted_to == "pairs" and fit(None).fitted_to == "pairs"
    # What is right goes the one way in half of the prompts, the other way in the rest: left out, each prompt is judged
    # by a majority of the others, and all are lost. The given pairs know nothing of that feature, so they win.
    lost = PairFeatures(np.zeros((16, 9)), np.zeros((16, 9)), list(range(100, 116)))
    lost.chosen[:, 3], lost.chosen[:, 5] = np.tile([1.0, -1.0], 8), 1e-3
    assert fit(lost).fitted_to == "pairs" and fit(lost, fit_to="candidates").fitted_to == "candidates"
    # Noise, on which the pairs do better by luck: such a difference is none.
    noise = own_pairs(np.random.default_rng(5), 12, 3, 0)
    own = calibrate(noise.chosen, noise.rejected, noise.prompts, scales=np.ones(9), given=given).held_out
    by_pairs = (noise.chosen - noise.rejected)[:, COLUMNS] @ np.asarray(fit(noise, fit_to="pairs").linear[1])
    assert (own > 0).mean() < (by_pairs > 0).mean() and fit(noise).fitted_to == "candidates"
    few = own_pairs(rng, 7, 3, -1)
    assert fit(few).fitted_to == "pairs" and fit(few, fit_to="candidates").fitted_to == "candidates"
    for pairs, number in ((None, 0), (own_pairs(rng, 1, 3, -1), 1)):
        with pytest.raises(UserError, match=f"calibrate_on: {number} prompts .* sample more candidates"):
            fit(pairs, fit_to="candidates")


def test_prompts_with_known_answers_come_first_where_they_are_enough():
    known = pairs_of(9)
    unknown = [dataclasses.replace(pair, answer=None) for pair in pairs_of(40)[9:]]
    assert list(prompts_to_sample([*unknown, *known])) == [pair.prompt_ids for pair in known]
    found = prompts_to_sample([*unknown, *known[:7]])
    assert list(found) == [pair.prompt_ids for pair in unknown[:16]] and set(found.values()) == {None}
    assert len(prompts_to_sample(pairs_of(80))) == 64


def test_the_verdict_on_a_score_that_is_there():
    rng = np.random.default_rng(2)
    better, worse = rng.normal(size=(2, 60, 9))
    better[:, 5] += 3
    good, bad = (("mean_logprob",), (1.0,)), (("fork_entropy",), (1.0,))
    accuracy, verdict = fixed_score_verdict(better, worse, range(60), good, which="that were given")
    assert verdict.kind == "informative"
    assert accuracy["calibrated"].value == pytest.approx(np.mean(better[:, 5] > worse[:, 5]))
    _, verdict = fixed_score_verdict(better, worse, range(60), bad, which="that were given")
    assert verdict.kind == "not_informative" and "60 pairs that were given" in verdict.words


def test_the_hash_knows_the_pairs():
    assert pairs_hash(pairs_of(3)) == pairs_hash(pairs_of(3)) != pairs_hash(pairs_of(2))


def test_the_default_features_are_those_of_the_settings():
    assert DEFAULT_FEATURES == SCORE_FEATURES and set(SCORE_FEATURES) <= set(FEATURES)


# The command.


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
    folder = tmp_path_factory.mktemp("calibrate")
    save_tiny(folder / "model", context=1024)
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(12, seed=3))
    write_jsonl(folder / "others.jsonl", arithmetic_pairs(4, seed=4))
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in arithmetic_pairs(12, seed=3)]
    write_jsonl(folder / "unknown.jsonl", rows)
    return folder


SMALL = ["--max-completion-length", 8, "--sample", 2, "--system-prompt", ""]


def test_the_command_writes_score_and_page_and_ends_with_the_verdict(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "score.json"
    command = ["calibrate", folder / "model", folder / "pairs.jsonl", "--out", out]
    code, printed, err = call([*command, *SMALL], monkeypatch, capsys)
    assert code == 0, err
    score = read_score(out)
    assert score.num_pairs == 12 and score.features == list(DEFAULT_FEATURES) and score.scales_from == "candidates"
    assert score.model == str(folder / "model") and score.samples.num_prompts == 12
    assert " ".join(printed.split()).endswith(" ".join(score.verdict.words.split()))
    page = tmp_path / "score.html"
    assert f"Page: {page}" in err and "<html" in page.read_text() and f"Score: {out}" in err
    code, _, err = call([*command, *SMALL], monkeypatch, capsys)
    assert code == 2 and "exists" in err and err.count("\n") == 1
    out.unlink()
    assert call([*command, *SMALL], monkeypatch, capsys)[0] == 0 and read_score(out) == score


def test_the_command_without_samples_and_with_other_prompts(folder, tmp_path, monkeypatch, capsys):
    command = ["calibrate", folder / "model", folder / "pairs.jsonl", "--system-prompt", "", "--features", "length"]
    code, _, err = call([*command, "--sample", 0, "--out", tmp_path / "a.json"], monkeypatch, capsys)
    assert code == 0, err
    plain = read_score(tmp_path / "a.json")
    assert plain.scales_from == "pairs" and plain.samples is None and plain.features == ["length"]
    more = [*SMALL, "--eval-file", folder / "others.jsonl", "--out", tmp_path / "b.json"]
    code, _, err = call([*command, *more], monkeypatch, capsys)
    assert code == 0, err
    other = read_score(tmp_path / "b.json")
    assert other.samples.num_prompts == 4 and other.num_pairs == 12 and other.pairs_hash == plain.pairs_hash
    unknown = ["calibrate", folder / "model", folder / "unknown.jsonl", *SMALL, "--out", tmp_path / "c.json"]
    code, _, err = call(unknown, monkeypatch, capsys)
    assert code == 0 and read_score(tmp_path / "c.json").samples is None, err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--features", "entropy"], "'entropy' is unknown; choose from"),
        (["--features", "length,length"], "name each once"),
        (["--top-m", 0], "share in (0, 1]"),
        (["--out", "page.html"], "page takes that name"),
        (["--out", "nowhere/score.json"], "does not exist"),
        (["--sample", 0, "--eval-file", "x.jsonl"], "--sample"),
        (["--sample", 0, "--calibrate-on", "candidates"], "--sample of at least 2"),
        (["--calibrate-on", "samples"], "auto, pairs"),
        (["--eval-file", "missing.jsonl"], "missing.jsonl"),
        (["--eval-file", "UNKNOWN"], "no row has a known answer"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [folder / "unknown.jsonl" if flag == "UNKNOWN" else flag for flag in flags]
    loads = []
    monkeypatch.setattr(OpenedModel, "policy", lambda *a: loads.append(a))
    code, _, err = call(["calibrate", folder / "model", folder / "pairs.jsonl", *flags], monkeypatch, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("gem: ") and words in last
    assert not loads and not list(tmp_path.iterdir())


def test_too_few_pairs_are_named(folder, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "one.jsonl", arithmetic_pairs(1))
    out = tmp_path / "s.json"
    command = ["calibrate", folder / "model", tmp_path / "one.jsonl", "--sample", 0, "--out", out]
    code, _, err = call(command, monkeypatch, capsys)
    assert code == 2 and "at least 2 prompts" in err and not out.exists()
    content = json.dumps({"prompt": "a", "chosen": "b"})
    (tmp_path / "bad.jsonl").write_text(content + "\n")
    code, _, err = call([*command[:2], tmp_path / "bad.jsonl", *command[3:]], monkeypatch, capsys)
    assert code == 2 and "rejected" in err
