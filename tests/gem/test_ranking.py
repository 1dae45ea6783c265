"""Ranking: standard errors, comparisons, Bradley-Terry strengths, trimming and pairing, by hand and by their laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem.config.settings import Scoring
from gem.errors import UserError
from gem.scoring.ranking import (
    best_and_worst,
    bradley_terry,
    pairs_decided,
    score_standard_errors,
    trim,
    win_probabilities,
)
from gem_kernels import LinearScore, entropy_scores

ALL = torch.ones(1, 3, dtype=torch.bool)


PAPER = LinearScore({"final_entropy": -1.0, "fork_entropy": 1.0})


def errors_of(entropy, mask, answer_start, group_size, **arguments):
    """Of the paper's score."""
    return score_standard_errors(entropy, -entropy, mask, answer_start, group_size, linear=PAPER, **arguments)


def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_standard_error_by_hand():
    """Reasoning 4, 1, 2, 0 with top_m = 2: {4, 2}; answer 1, 3. The second is one answer token and no reasoning."""
    entropy = torch.tensor([[4.0, 1, 2, 0, 1, 3], [9, 7, 7, 7, 7, 7]])
    mask = torch.tensor([[True] * 6, [True] + [False] * 5])
    errors = score_standard_errors(
        entropy, -entropy, mask, torch.tensor([4, 0]), 2, top_m=2,
        linear=LinearScore({"final_entropy": -2.0, "fork_entropy": 3.0}),
    )  # fmt: skip
    # Both spans have sample variance 2 and two values, so their means have variance 1; 4 * 1 + 9 * 1.
    assert errors[0, 0] == pytest.approx(math.sqrt(13))
    # One token: the group's pooled variance of answer spans is 2 (from the first), over 1 token; 4 * 2.
    assert errors[0, 1] == pytest.approx(math.sqrt(8))


def test_standard_error_of_log_probs_by_hand():
    """Log-probs -1, -3, -5: sample variance 4, the mean's 4/3, the sum's 9 * 4/3; the length has none."""
    logprobs = torch.tensor([[-1.0, -3.0, -5.0]])
    mask, start = torch.ones(1, 3, dtype=torch.bool), torch.tensor([2])
    for weights, variance in (
        ({"mean_logprob": 2.0}, 4 * 4 / 3),
        ({"sum_logprob": 1.0, "length": 7.0, "min_logprob": 1.0}, 9 * 4 / 3),
    ):
        linear = LinearScore(weights)
        error = score_standard_errors(-logprobs, logprobs, mask, start, 1, linear=linear)
        assert error.item() == pytest.approx(math.sqrt(variance))


def test_equal_tokens_have_no_error_and_lone_tokens_nothing_to_pool():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert errors_of(torch.full((2, 5), 0.3), mask, torch.tensor([3, 9]), 2).abs().max() < 1e-12
    one = torch.ones(2, 1, dtype=torch.bool)
    assert errors_of(torch.ones(2, 1), one, torch.tensor([0, 0]), 2).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("top_m", [0.1, 0.29, 1.0, 1, 3, 50])
def test_spans_are_those_of_the_scores(top_m):
    """Where all entropies of the answer and of the top m are one value, the error is 0: so both see the same spans."""
    generator = torch.Generator().manual_seed(0)
    for start in (0, 7, 60, 100, 400):
        entropy = torch.rand(1, 100, generator=generator)
        mask = torch.ones(1, 100, dtype=torch.bool)
        place = start if start < 100 else 80
        share = math.floor(round(top_m * 1000) * place / 1000) if isinstance(top_m, float) else min(top_m, place)
        top = entropy[0, :place].argsort(descending=True)[: max(1, share)] if place else []
        entropy[0, top], entropy[0, place:] = 2.0, 0.5
        answer_start = torch.tensor([start])
        assert errors_of(entropy, mask, answer_start, 1, top_m=top_m).item() == 0
        scores = entropy_scores(entropy, completion_mask=mask, answer_start=answer_start, top_m=top_m)
        assert scores.score.item() == pytest.approx(2.0 * bool(place) - 0.5)


def test_probabilities_by_hand():
    scores = torch.tensor([[1.0, 0.0, 5.0]])
    errors = torch.tensor([[0.6, 0.8, 0.0]])
    p = win_probabilities(scores, errors, torch.tensor([[True, True, False]]))[0]
    assert p[0, 1] == pytest.approx(phi(1.0)) and p[1, 0] == pytest.approx(1 - phi(1.0))
    assert p[2].tolist() == [0.5, 0.5, 0.5] and p[:, 2].tolist() == [0.5, 0.5, 0.5]
    certain = win_probabilities(torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 3), ALL)[0]
    assert certain.tolist() == [[0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.5, 1.0, 0.5]]


def test_strengths_of_two_are_their_log_odds():
    p = torch.tensor([[[0.5, 0.8], [0.2, 0.5]]], dtype=torch.float64)
    theta = bradley_terry(p, torch.ones(1, 2, dtype=torch.bool))[0]
    assert theta.tolist() == pytest.approx([math.log(4) / 2, -math.log(4) / 2], abs=1e-8)


def test_strengths_that_made_the_probabilities_are_found():
    theta = torch.tensor([[0.4, -1.1, 0.9, -0.2], [2.0, 0.0, -1.0, -1.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True, True], [True, True, False, True]])
    p = torch.sigmoid(theta[:, :, None] - theta[:, None, :])
    truth = torch.where(valid, theta - (theta * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True), 0.0)
    assert torch.allclose(bradley_terry(p, valid), truth, atol=1e-7)


def test_large_groups_in_which_nearly_all_is_certain_converge():
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(4, 64, dtype=torch.bool)
    for error in (0.0, 0.02):
        p = win_probabilities(scores, torch.full((4, 64), error), valid).clamp(1e-3, 1 - 1e-3)
        theta = bradley_terry(p, valid)
        expected = torch.sigmoid(theta[:, :, None] - theta[:, None, :])
        assert torch.allclose(expected.sum(2), p.sum(2), atol=1e-8)
        assert torch.equal(theta.argsort(1), scores.argsort(1))


def test_scores_that_are_not_numbers_stay_in_their_group():
    p = win_probabilities(torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, 3.0]]), torch.ones(2, 3), ALL.repeat(2, 1))
    theta = bradley_terry(p, ALL.repeat(2, 1))
    assert theta[0].isnan().any() and torch.allclose(theta[1], bradley_terry(p[1:], ALL)[0])


def test_certain_and_lonely_candidates_have_finite_strengths():
    p = win_probabilities(torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(1, 3), ALL)
    theta = bradley_terry(p, ALL)[0]
    assert torch.isfinite(theta).all() and theta[0] > theta[1] > theta[2]
    alone = torch.tensor([[False, True, False]])
    assert bradley_terry(p, alone).tolist() == [[0.0, 0.0, 0.0]]


@st.composite
def groups(draw):
    size = draw(st.integers(2, 6))
    number = st.floats(-3, 3).map(lambda x: round(x, 3))
    scores = draw(st.lists(number, min_size=size, max_size=size))
    errors = draw(st.lists(st.floats(0, 2), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor([scores]), torch.tensor([errors]), torch.tensor([valid])


@settings(max_examples=150, deadline=None)
@given(groups())
def test_laws(group):
    scores, errors, valid = group
    p = win_probabilities(scores, errors, valid)
    assert torch.allclose(p + p.mT, torch.ones_like(p), atol=1e-12)
    theta = bradley_terry(p, valid)
    assert abs(theta.sum()) < 1e-8 and (theta[~valid] == 0).all() and torch.isfinite(theta).all()
    # Everyone met everyone once, so strengths stand in the order of the expected wins ...
    wins = (p.clamp(1e-3, 1 - 1e-3) * (valid[:, :, None] & valid[:, None, :])).sum(2)[0]
    rows = valid[0].nonzero().flatten().tolist()
    for i in rows:
        for j in rows:
            if wins[i] > wins[j] + 1e-6:
                assert theta[0, i] > theta[0, j]
    # ... and at the maximum expected wins equal observed wins.
    model = torch.sigmoid(theta[:, :, None] - theta[:, None, :])[0][rows][:, rows].sum(1) - 0.5
    assert torch.allclose(model, wins[rows] - 0.5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(groups(), st.sampled_from([0.0, 0.1, 0.25, 0.49]))
def test_trimming_by_rank_keeps_the_middle(group, share):
    scores, _, valid = group
    kept = trim(scores, valid, Scoring(trim="rank", trim_share=share))
    n, cut = int(valid.sum()), math.floor(share * int(valid.sum()) + 1e-9)
    assert not (kept & ~valid).any() and int(kept.sum()) == n - 2 * cut
    if kept.any():
        low, high = scores[kept].min(), scores[kept].max()
        assert int((scores[valid] < low).sum()) <= cut and int((scores[valid] > high).sum()) <= cut


def test_trimming_by_deviation_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 20.0], [1.0, 1.0, 1.0, 9.0, 1.0]])
    valid = torch.ones(2, 5, dtype=torch.bool)
    # Row 0: median 3, deviations 2, 1, 0, 1, 17: MAD 1, limit 3 * 1.4826 = 4.4. Row 1: MAD 0, nothing goes.
    assert trim(scores, valid, Scoring(trim="mad")).tolist() == [[True, True, True, True, False], [True] * 5]
    assert trim(scores, valid, Scoring(trim="mad", trim_mad=1.0))[0].tolist() == [False, True, True, True, False]
    # An invalid candidate has no say in the median and stays invalid.
    valid[0, 0] = False
    assert trim(scores, valid, Scoring(trim="mad"))[0].tolist() == [False, True, True, True, False]
    assert trim(scores, valid, Scoring()) is valid
    with pytest.raises(UserError, match="none, mad, rank"):
        trim(scores, valid, Scoring(trim="sigma"))


def test_best_and_worst():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [9.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [False, True, True], [True, False, False]])
    assert best_and_worst(scores, valid).tolist() == [[1, 0], [8, 7]]
    assert best_and_worst(scores, torch.zeros_like(valid)).shape == (0, 2)


def test_decided_pairs_by_hand():
    """Differences of 1, 3 and 2 standard errors of 1: P = 0.84, 0.9987, 0.977; two of three are decided."""
    p = win_probabilities(torch.tensor([[3.0, 2.0, 0.0]]), torch.full((1, 3), math.sqrt(0.5)), ALL)
    assert pairs_decided(p, ALL) == pytest.approx(2 / 3)
    assert math.isnan(pairs_decided(p, torch.tensor([[True, False, False]])))
