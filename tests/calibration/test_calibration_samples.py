"""Measures on samples against brute force, and probabilities against their definitions."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from gem.calibration.probability import fit_platt, preference_probabilities, reliability, right_probabilities
from gem.calibration.samples import evaluate_samples, roc_within
from gem.errors import UserError
from gem.statistics import auroc_within


def draw(num_prompts, size, seed, strength=1.0):
    """Answers of few kinds, right where the answer is "7"; a score that knows something of it, with ties."""
    rng = np.random.default_rng(seed)
    answers = rng.choice(["7", "8", "9", None], size=(num_prompts, size), p=[0.35, 0.3, 0.15, 0.2])
    correct = answers == "7"
    scores = np.round(strength * correct + rng.normal(size=correct.shape), 1)
    return scores, correct, answers.tolist(), rng.random(correct.shape) < 0.85


def area(roc):
    false, true = np.array(roc.false_positive), np.array(roc.true_positive)
    return float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_against_brute_force(seed):
    scores, correct, answers, valid = draw(30, 6, seed)
    valid[3] = False
    found = evaluate_samples({"calibrated": scores, "other": -scores}, correct, answers, valid)
    best, voted, weighted, within, over = [], [], [], [], []
    for p in range(30):
        kept = [i for i in range(6) if valid[p, i]]
        top = [i for i in kept if scores[p, i] == max(scores[p, k] for k in kept)]
        best.append(sum(correct[p, i] for i in top) / len(top) if top else 0.0)
        votes, sums = defaultdict(int), defaultdict(float)
        for i in range(6):
            if answers[p][i] is not None:
                votes[answers[p][i]] += 1
                if valid[p, i]:
                    sums[answers[p][i]] += math.exp(scores[p, i])
        voted.append(bool(votes) and max(votes, key=votes.get) == "7")
        weighted.append(bool(sums) and max(sums, key=sums.get) == "7")
        for i in kept:
            for q in range(30):
                for k in range(6):
                    if valid[q, k] and correct[p, i] and not correct[q, k]:
                        won = (np.sign(scores[p, i] - scores[q, k]) + 1) / 2
                        over.append(won)
                        if p == q:
                            within.append(won)
    assert found.single.value == pytest.approx(correct.mean()) and found.single.count == 180
    assert found.any.value == pytest.approx(correct.any(1).mean())
    assert found.best_of["calibrated"].value == pytest.approx(np.mean(best))
    assert found.majority.value == pytest.approx(np.mean(voted))
    assert found.weighted_majority["calibrated"].value == pytest.approx(np.mean(weighted))
    assert found.auroc_within["calibrated"].value == pytest.approx(np.mean(within))
    assert found.auroc_over["calibrated"].value == pytest.approx(np.mean(over))
    assert found.auroc_within["other"].value == pytest.approx(1 - np.mean(within))
    assert found.difference["calibrated"].value == pytest.approx(np.mean(best) - correct.mean())
    assert area(found.roc_within) == pytest.approx(np.mean(within))
    assert (found.num_prompts, found.num_generations) == (30, 6)
    for estimate in (
        found.single,
        found.any,
        found.majority,
        found.difference["calibrated"],
        found.auroc_within["other"],
    ):
        assert estimate.low <= estimate.value <= estimate.high and estimate.low < estimate.high


def test_the_difference_is_paired():
    """The prompts differ much, best of 2 is right by one half more in each: the difference has hardly any spread."""
    correct = np.array([[True, False]] * 30 + [[False, False]] * 2)
    scores = correct.astype(float)
    found = evaluate_samples({"s": scores}, correct, [["1", "2"]] * 32, correct | True, main="s")
    assert found.difference["s"].value == pytest.approx(15 / 32)
    assert found.difference["s"].low > 0.42 and found.difference["s"].high <= 0.5
    assert found.best_of["s"].high - found.best_of["s"].low > 0.15


def test_a_score_that_knows_nothing_equals_one_sample():
    _, correct, answers, _ = draw(40, 5, 3)
    same = np.zeros(correct.shape)
    found = evaluate_samples({"same": same}, correct, answers, correct | True, main="same")
    assert found.best_of["same"].value == pytest.approx(found.single.value)
    assert found.difference["same"].value == pytest.approx(0, abs=1e-12)
    assert found.auroc_within["same"].value == found.auroc_over["same"].value == 0.5
    assert area(found.roc_within) == 0.5 and found.reliability == []
    assert found.weighted_majority["same"].value == found.majority.value


def test_all_right_all_wrong_and_none_valid():
    answers = [["1", "1"], ["1", None]]
    everything = np.ones((2, 2), bool)
    right = evaluate_samples({"calibrated": [[1.0, 2.0]] * 2}, everything, answers, everything)
    assert right.single.value == right.best_of["calibrated"].value == right.majority.value == 1
    assert right.auroc_within == right.auroc_over == {} and right.roc_within.false_positive == []
    none = evaluate_samples({"calibrated": [[math.nan] * 2] * 2}, everything, answers, ~everything)
    assert none.best_of["calibrated"].value == none.weighted_majority["calibrated"].value == 0
    wrong = evaluate_samples({"calibrated": [[1.0, 2.0]] * 2}, ~everything, [[None] * 2] * 2, everything)
    assert wrong.any.value == wrong.majority.value == 0 and wrong.any.high > 0


def test_answers_are_compared_normalised():
    correct = np.array([[False, True, True]])
    answers = [["8", "7 dollars", "$7.00"]]
    scores = np.array([[0.5, 0.0, 0.0]])
    found = evaluate_samples({"calibrated": scores}, correct, answers, correct | True)
    assert found.majority.value == 1.0
    assert found.weighted_majority["calibrated"].value == 1.0  # 2 e^0 > e^0.5
    found = evaluate_samples({"calibrated": scores * 2}, correct, answers, correct | True)
    assert found.weighted_majority["calibrated"].value == 0.0  # 2 e^0 < e^1


def test_tensors_do_as_well_and_the_seed_decides():
    scores, correct, answers, valid = draw(20, 4, 1)
    one = evaluate_samples({"calibrated": scores}, correct, answers, valid, seed=3)
    tensors = torch.tensor(scores), torch.tensor(correct), torch.tensor(valid)
    assert one == evaluate_samples({"calibrated": tensors[0]}, tensors[1], answers, tensors[2], seed=3)
    assert one != evaluate_samples({"calibrated": scores}, correct, answers, valid, seed=4)


@pytest.mark.parametrize("seed", range(6))
def test_the_area_under_the_curve_within_prompts(seed):
    """Groups of unequal numbers of right and wrong samples, with ties: the area is the AUROC within prompts."""
    scores, correct, _, valid = draw(25, 3 + seed, seed)
    roc = roc_within(scores, correct, valid)
    expected = auroc_within(torch.tensor(scores), torch.tensor(correct), torch.tensor(valid))
    assert area(roc) == pytest.approx(expected, rel=1e-12)
    false, true = np.array(roc.false_positive), np.array(roc.true_positive)
    assert (np.diff(false) >= 0).all() and (np.diff(true) >= -1e-12).all()
    assert false[0] == 0 and false[-1] == 1 and true[-1] == pytest.approx(1)


def test_preference_probabilities():
    scores = np.array([[1.0, 3.0, 1000.0], [math.nan, 2.0, 2.0], [1.0, 2.0, 3.0], [-800.0, -801.0, 5.0]])
    valid = np.array([[True, True, False], [False, True, True], [False] * 3, [True, True, False]])
    p = preference_probabilities(scores, valid)
    assert p[0, 1] == pytest.approx(expit(2.0)) and p[0, 2] == 0  # of two: Bradley and Terry
    assert p[1].tolist() == [0, 0.5, 0.5] and p[2].tolist() == [0, 0, 0]
    assert p[3, 0] == pytest.approx(expit(1.0))


def test_platt_is_the_maximum_of_its_likelihood():
    scores, correct, _, valid = draw(60, 5, 2)
    found = fit_platt(scores * 30 + 400, correct, valid)
    s, right = scores[valid], correct[valid]
    n = right.sum()
    target = np.where(right, (n + 1) / (n + 2), 1 / (len(right) - n + 2))

    def loss(ab):
        margin = ab[0] * s + ab[1]
        return (target * np.logaddexp(0, -margin) + (1 - target) * np.logaddexp(0, margin)).sum()

    slope, intercept = minimize(loss, np.zeros(2), tol=1e-12).x
    assert found.slope * 30 == pytest.approx(slope, rel=1e-4) and found.count == valid.sum()
    assert found.intercept + 400 * found.slope == pytest.approx(intercept, rel=1e-3)
    p = right_probabilities(found, scores * 30 + 400)[valid]
    assert p.mean() == pytest.approx(target.mean(), rel=1e-6)


def test_platt_stays_off_certainty():
    """Separable samples: the targets keep the slope finite."""
    scores = np.array([[0.0, 1.0], [0.1, 1.1], [0.2, 1.2]])
    correct = np.array([[False, True]] * 3)
    found = fit_platt(scores, correct, correct | True)
    p = right_probabilities(found, scores)
    assert (p[correct] < 0.9).all() and (p[~correct] > 0.1).all() and (p[correct] > p[~correct].max()).all()


def test_platt_says_nothing_where_it_cannot():
    scores, correct, _, valid = draw(30, 4, 2)
    assert fit_platt(scores, correct & False, valid) is None and fit_platt(scores, correct | True, valid) is None
    assert fit_platt(scores * 0 + 3, correct, valid) is None and fit_platt(scores, correct, valid & False) is None
    assert fit_platt(-scores, correct, valid) is None  # higher does not mean right


def test_reliability_is_that_of_other_prompts():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 8))
    correct = rng.random((400, 8)) < expit(1.5 * scores - 0.5)
    bins = reliability(scores, correct, correct | True)
    assert sum(b.count for b in bins) == 3200 and len(bins) >= 8
    for b in bins:
        assert b.share_right == pytest.approx(b.confidence, abs=4 * math.sqrt(0.25 / b.count))
    assert reliability(scores[:1], correct[:1], correct[:1] | True) == []
    # By hand: the first group of prompts is judged by what the others say, and by nothing of its own.
    few = scores[:10], correct[:10], valid_all(10)
    held = np.zeros((10, 8))
    for start in range(5):
        rest = np.arange(10) % 5 != start
        held[~rest] = right_probabilities(fit_platt(*(x[rest] for x in few)), scores[:10][~rest])
    expected = np.histogram(held, np.linspace(0, 1, 11))[0]
    assert [b.count for b in reliability(*few)] == [n for n in expected if n]


def valid_all(num_prompts):
    return np.ones((num_prompts, 8), bool)


def test_refusals():
    scores, correct, answers, valid = draw(5, 3, 0)
    good = {"calibrated": scores}
    with pytest.raises(UserError, match=r"expected valid as \[P, G\] = \[5, 3\], as correct has it, got \[5, 2\]"):
        evaluate_samples(good, correct, answers, valid[:, :2])
    with pytest.raises(UserError, match=r"expected score 'calibrated' as .* got \[4, 3\]"):
        evaluate_samples({"calibrated": scores[:4]}, correct, answers, valid)
    with pytest.raises(UserError, match=r"expected answers as .* got \[5, 2, 3\]|got \[5, 3, 2\]"):
        evaluate_samples(good, correct, [*answers[:4], answers[4][:2]], valid)
    with pytest.raises(UserError, match=r"at least one sample, got \[0, 3\]"):
        evaluate_samples({"calibrated": scores[:0]}, correct[:0], [], valid[:0])
    with pytest.raises(UserError, match="main is 'other', expected one of the scores: calibrated"):
        evaluate_samples(good, correct, answers, valid, main="other")
    scores[2, 1], valid[2, 1] = math.nan, True
    with pytest.raises(UserError, match=r"sample 1 of prompt 2 .* is nan, expected a finite number"):
        evaluate_samples(good, correct, answers, valid)
    valid[2, 1] = False
    assert evaluate_samples(good, correct, answers, valid).best_of["calibrated"].count == 5
