"""Features of given pairs and of the model's own candidates, the scales these give, and `gem calibrate` as a whole."""

import json
import sys

import numpy as np
import pytest
import torch

from gem import cli
from gem.calibration.features import DEFAULT_FEATURES, FEATURES
from gem.calibration.fit import calibrate, candidate_scales, fixed_score_verdict
from gem.calibration.measure import (
    calibrate_policy,
    candidate_features,
    candidate_scores,
    measure_samples,
    own_candidates,
    pair_features,
    pairs_hash,
)
from gem.calibration.score_file import read_score
from gem.config.settings import SCORE_FEATURES, Sampling, Scoring
from gem.data.batches import TokenizedPair
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError
from gem.files import write_jsonl
from gem.model.forward import Policy, completion_stats
from gem.model.opened import OpenedModel
from gem.rollout.sample import given_completions
from tests.helpers import END, FORM, encode, save_tiny, tiny_model

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
    scores = candidate_scores(fitted, given, prompts, pool)
    np.testing.assert_allclose(scores[0], values[0][:, columns] @ fitted.held_out_weights[2])
    np.testing.assert_allclose(scores[1], values[1][:, columns] @ (fitted.weights / fitted.scales))
    assert measure_samples(scores, pool, [None, None]) == (None, None)
    truth = pool.rollout.spans.answers[3] or "4"
    samples, _ = measure_samples(scores, pool, [None, truth])
    assert samples.num_prompts == 1 and samples.num_generations == 3 and "calibrated" in samples.best_of


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
