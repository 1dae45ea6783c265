"""Measures: intervals, AUROC, calibration and votes, by hand and by their laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem.statistics import (
    auroc,
    auroc_estimates,
    auroc_within,
    bootstrap_interval,
    calibration,
    majority_answer,
    mean_estimate,
    share_estimate,
    wilson_interval,
)


def test_wilson_interval_by_hand():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_bootstrap_of_a_mean_is_its_normal_interval():
    values = torch.tensor(np.random.default_rng(1).normal(size=400))
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), range(400), seed=3)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.2 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.2 * half)


def test_the_bootstrap_resamples_whole_prompts_with_its_seed():
    """Four copies of each case are no new cases: the interval over prompts is that of one copy, not half as wide."""
    values = torch.tensor(np.random.default_rng(2).normal(size=50))
    one = mean_estimate(values, range(50), seed=5)
    copies = mean_estimate(values.repeat(4), [*range(50)] * 4, seed=5)
    assert copies.count == 200 and (copies.low, copies.high) == pytest.approx((one.low, one.high))
    assert mean_estimate(values, range(50), seed=5) == one != mean_estimate(values, range(50), seed=6)
    assert one.low < one.value < one.high


def test_a_share_is_wilsons_only_where_cases_are_independent():
    wins = torch.tensor([1.0, 0.5, 1.0, 0.0])
    assert share_estimate(wins, "abcd").low == wilson_interval(2.5, 4)[0]
    shared = share_estimate(wins, "aabb")
    assert shared.value == 0.625 and shared.low == 0.5 and shared.high == 0.75


def test_a_share_of_all_or_none_has_the_width_of_its_prompts():
    """Twelve samples of three prompts, all wrong: a bootstrap says [0, 0]."""
    for value in (0.0, 1.0):
        found = share_estimate(torch.full((12,), value), [prompt for prompt in "abc" for _ in range(4)])
        assert (found.value, found.count) == (value, 12)
        assert (found.low, found.high) == wilson_interval(3 * value, 3) and found.high - found.low > 0.5


def test_auroc_by_hand():
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0, 5.0])
    correct = torch.tensor([True, True, False, False, False])
    # 3 beats 2 and 1, not 5; 2 ties 2, beats 1, loses to 5: (2 + 1.5) / 6.
    assert auroc(scores, correct) == pytest.approx(3.5 / 6)
    assert auroc(scores, torch.ones(5, dtype=torch.bool)) is None
    assert auroc(scores, torch.zeros(5, dtype=torch.bool)) is None
    assert auroc(torch.ones(4), torch.tensor([True, False, True, False])) == 0.5


def test_auroc_within_prompts_ignores_what_tells_prompts_apart():
    """Easy prompts score higher and are right more often; within each, right and wrong stand in the wrong order."""
    scores = torch.tensor([[9.0, 8.0, 7.0], [2.0, 3.0, 0.0]])
    correct = torch.tensor([[True, True, True], [True, False, False]])
    valid = torch.ones(2, 3, dtype=torch.bool)
    assert auroc(scores.flatten(), correct.flatten()) == pytest.approx(7 / 8)
    assert auroc_within(scores, correct, valid) == 0.5
    valid[1, 2] = False
    assert auroc_within(scores, correct, valid) == 0.0
    overall, within = auroc_estimates(scores, correct, valid)
    assert overall.value == pytest.approx(3 / 4) and within.value == 0.0 and overall.count == 5
    assert 0 <= overall.low <= overall.value <= overall.high <= 1
    assert auroc_estimates(scores, correct | True, valid) == (None, None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_share_of_pairs(cases):
    scores, correct = torch.tensor([float(s) for s, _ in cases]), torch.tensor([c for _, c in cases])
    wins = [(s > t) + 0.5 * (s == t) for s, c in cases for t, d in cases if c and not d]
    value = auroc(scores, correct)
    assert value == (pytest.approx(sum(wins) / len(wins)) if wins else None)
    if wins:
        assert auroc(-scores, correct) == pytest.approx(1 - value)
        assert auroc_within(scores[None], correct[None], torch.ones_like(correct)[None]) == pytest.approx(value)


def test_calibration_by_hand():
    """p = 0.8, 0.8, 0.8, 0.2: four predictions of confidence 0.8, three right; p = 0.5 is half right."""
    logit = math.log(4)
    result = calibration(torch.tensor([1.0, 1.0, 1.0, -1.0]) * logit / 0.1, 0.1, "abcd")
    assert result.error.value == pytest.approx(0.05) and result.brier.value == pytest.approx((3 * 0.04 + 0.64) / 4)
    assert [(b.count, b.accuracy) for b in result.bins] == [(4, 0.75)]
    assert result.bins[0].confidence == pytest.approx(0.8)
    unsure = calibration(torch.zeros(3), 1.0, "abc")
    assert unsure.error.value == 0 and unsure.brier.value == 0.25 and unsure.bins[0].accuracy == 0.5
    certain = calibration(torch.tensor([1e9, -1e9]), 1.0, "ab")
    assert certain.error.value == pytest.approx(0.5) and certain.bins[0].confidence == 1.0


def test_outcomes_drawn_with_the_predicted_probability_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(20_000, generator=generator, dtype=torch.float64) * 2
    happens = torch.rand(20_000, generator=generator) < torch.sigmoid(difference)
    right = torch.where(happens, difference, -difference)
    assert calibration(right[:4000], 1.0, range(4000)).error.value < 0.03
    assert calibration(right[:4000], 4.0, range(4000)).error.value > 0.1  # over-confident


def test_majority():
    assert majority_answer(["4", "5", "4.0", None]) == "4"
    assert majority_answer(["5", "4", "$4"]) == "4"
    assert majority_answer(["7", "4"]) == "7" and majority_answer([None, None]) is None
