"""Which of a prompt's candidates are better, and which differences are noise: float64 on tensors [P, G].

A score is a difference of two means of token entropies, and a mean of n tokens has a standard error. With it each
comparison of two candidates is a probability, the probabilities give Bradley-Terry strengths, and a difference that
the tokens cannot decide is told from one they can.

What the standard errors assume: the token entropies of a span are independent draws of one distribution, and answer
and reasoning are independent of each other. Neighbouring tokens are in truth correlated, and the top m are chosen for
being large, so the errors are too small rather than too large: a pair called undecided is undecided.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from gem.config.settings import Scoring
from gem.scoring.forks import answer_and_reasoning
from gem_kernels import LinearScore, num_fork_tokens

# Probabilities are kept this far from 0 and 1 before strengths are fitted. Beyond it (3.1 standard errors) the normal
# tail says more than its assumptions bear, and with a pair that is certain the likelihood has no maximum.
CERTAINTY = 1e-3
# A pair of candidates is decided where one of them is better with more than this probability.
DECIDED = 0.95
# The median absolute deviation of a normal sample times this is its standard deviation.
MAD_TO_SD = 1.4826


def score_standard_errors(
    entropy: Tensor,
    logprobs: Tensor,
    completion_mask: Tensor,
    answer_start: Tensor,
    group_size: int,
    *,
    linear: LinearScore,
    top_m: float | int = 0.1,
) -> Tensor:
    """Standard error of a linear score S = sum_f c_f x_f: [P, G] float64, in units of S.

        se(mean of n values) = sd / sqrt(n),  sd the sample deviation (n - 1)                    [delta method, exact
        se(S)^2 = sum_f c_f^2 se(x_f)^2                                                           for a linear S]

    A sum of n values has n times the error of its mean. Largest, smallest and length are taken as known. A span of one
    token shows no spread of its own: it is given the pooled deviation of its group's spans of the same kind (sum of
    squares over sum of degrees of freedom), 0 where no span of the group has two tokens.

    Args:
        entropy, logprobs: [B, T] nats; completion_mask: [B, T] bool, True counts, padded on the right.
        answer_start: [B], as for `gem_kernels.entropy_scores`: outside [0, length) the last fifth is the answer.
        top_m: a share (float) or a count (int) of the reasoning tokens.
    """
    values, logprobs = entropy.double(), logprobs.double()
    answer, reasoning = answer_and_reasoning(completion_mask, answer_start)
    num_top = num_fork_tokens(reasoning.sum(1), top_m)
    column = torch.arange(completion_mask.shape[1], device=entropy.device)
    ordered = values.masked_fill(~reasoning, -torch.inf).sort(1, descending=True).values
    top = column < num_top[:, None]
    spans = {
        "final_entropy": (values, answer),
        "fork_entropy": (ordered.masked_fill(~top, 0.0), top),
        "reasoning_entropy": (values, reasoning),
        "mean_entropy": (values, completion_mask),
        "mean_logprob": (logprobs, completion_mask),
        "sum_logprob": (logprobs, completion_mask),
    }
    lengths = completion_mask.sum(1).view(-1, group_size)
    variance = torch.zeros(lengths.shape, dtype=torch.float64, device=entropy.device)
    for name, (numbers, mask) in spans.items():
        if coefficient := linear.coefficient(name):
            of_mean = _mean_variance(numbers, mask, group_size)
            variance += coefficient**2 * (of_mean * lengths**2 if name == "sum_logprob" else of_mean)
    return variance.sqrt()


def _mean_variance(values: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Squared standard error of the mean over the masked values of each row: [P, G]."""
    count = mask.sum(1).view(-1, group_size)
    mean = values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp_min(1)
    squares = (values - mean[:, None]).masked_fill(~mask, 0.0).square().sum(1).view(-1, group_size)
    freedom = (count - 1).clamp_min(0)
    pooled = squares.sum(1, keepdim=True) / freedom.sum(1, keepdim=True).clamp_min(1)
    variance = torch.where(freedom > 0, squares / freedom.clamp_min(1), pooled)
    return torch.where(count > 0, variance / count.clamp_min(1), 0.0)


def win_probabilities(scores: Tensor, standard_errors: Tensor, valid: Tensor) -> Tensor:
    """P(i beats j) = Phi((S_i - S_j) / sqrt(se_i^2 + se_j^2)): [P, G] each -> [P, G, G] float64.

    Without any error it is 1, 1/2 or 0. One half on the diagonal and wherever a candidate is invalid.
    """
    scores, variance = scores.double(), standard_errors.double().square()
    difference = scores[:, :, None] - scores[:, None, :]
    error = (variance[:, :, None] + variance[:, None, :]).sqrt()
    z = torch.where(error > 0, difference / error, torch.inf * difference.sign())
    z = torch.where(difference == 0, 0.0, z)
    both = valid[:, :, None] & valid[:, None, :]
    return torch.where(both, torch.special.ndtr(z), 0.5)


def bradley_terry(probabilities: Tensor, valid: Tensor, *, tolerance: float = 1e-9, max_steps: int = 200) -> Tensor:
    """Log-strengths theta of P(i beats j) = sigma(theta_i - theta_j): [P, G, G] -> [P, G] float64.

    Maximum likelihood (Bradley and Terry 1952) where every pair was compared once and i won the share P_ij of it:

        log L = sum_{i != j} P_ij log sigma(theta_i - theta_j)
        d/dtheta_i = W_i - sum_j sigma(theta_i - theta_j),   W_i = sum_{j != i} P_ij     (expected = observed wins)
        -Hessian = diag(rows of V) - V,   V_ij = sigma (1 - sigma)                       (a graph's Laplacian)

    by Newton's method. A step is shortened until no difference theta_i - theta_j moves by more than 1: so far the
    curvature of log sigma changes by less than what would undo the ascent, so it converges from anywhere.

    The mean of theta over the valid candidates of a group is 0; invalid ones have 0. Probabilities are first kept
    within [CERTAINTY, 1 - CERTAINTY], so that the maximum exists; it is unique.
    """
    size = valid.shape[1]
    identity = torch.eye(size, dtype=torch.float64, device=valid.device)
    pairs = (valid[:, :, None] & valid[:, None, :] & (identity == 0)).double()
    shares = (probabilities.double() + 1 - probabilities.double().mT) / 2  # both of a pair sum to 1 beyond rounding
    wins = (shares.clamp(CERTAINTY, 1 - CERTAINTY) * pairs).sum(2)
    # The Laplacian is singular along constants; a constant added to each group's block fixes the mean at 0.
    anchor = torch.where(valid[:, :, None] & valid[:, None, :], 1.0 / size, identity)
    theta = torch.zeros_like(wins)
    for _ in range(max_steps):
        expected = torch.sigmoid(theta[:, :, None] - theta[:, None, :]) * pairs
        weights = expected * (1 - expected)
        laplacian = torch.diag_embed(weights.sum(2)) - weights + anchor
        step = torch.linalg.solve(laplacian, wins - expected.sum(2))
        spread = step.amax(1, keepdim=True) - step.amin(1, keepdim=True)
        step = step / spread.clamp_min(1.0)
        theta = theta + step
        if not bool((step.abs() > tolerance).any()):  # a group with NaN has its NaN and holds up no other
            break
    return theta


def pairs_decided(probabilities: Tensor, valid: Tensor) -> float:
    """Share of the pairs of valid candidates of one prompt in which one is better with P > 0.95; NaN without pairs."""
    pairs = (valid[:, :, None] & valid[:, None, :]).triu(1)
    decided = torch.maximum(probabilities, 1 - probabilities) > DECIDED
    return float(decided[pairs].double().mean()) if bool(pairs.any()) else float("nan")


def trim(scores: Tensor, valid: Tensor, scoring: Scoring) -> Tensor:
    """`valid` [P, G] less the outliers of each group, by their scores [P, G], as the setting `trim` says.

    "mad": farther from the group's median than `trim_mad` standard deviations, the deviation taken as 1.4826 times the
    median absolute deviation; nothing where that is 0 (half of the group equal). "rank": the floor(trim_share * n)
    lowest and as many of the highest of its n valid candidates, of equal ones the first. "none": nothing.
    """
    if scoring.trim == "none":
        return valid
    if scoring.trim == "mad":
        scores = scores.double().masked_fill(~valid, torch.nan)
        distance = (scores - _median(scores)).abs()
        limit = scoring.trim_mad * MAD_TO_SD * _median(distance)
        return valid & ~((distance > limit) & (limit > 0))
    place = scores.double().masked_fill(~valid, torch.inf).argsort(dim=1, stable=True).argsort(1)
    count, share = valid.sum(1, keepdim=True), Fraction(repr(scoring.trim_share))
    cut = count * share.numerator // share.denominator
    return valid & (place >= cut) & (place < count - cut)


def best_and_worst(scores: Tensor, valid: Tensor) -> Tensor:
    """Rows (best, worst) of each group with two valid candidates of different scores: [K, 2] int64 into [P * G].

    Of equal candidates the first.
    """
    scores = scores.double()
    best = scores.masked_fill(~valid, -torch.inf).argmax(1)
    worst = scores.masked_fill(~valid, torch.inf).argmin(1)
    pairs = torch.stack([best, worst], 1)
    values = scores.gather(1, pairs)
    kept = (valid.sum(1) >= 2) & (values[:, 0] > values[:, 1])
    first_row = torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]
    return (first_row + pairs)[kept]


def _median(values: Tensor) -> Tensor:
    """Median of each row's numbers (NaN left out), the mean of the two in the middle: [P, 1]."""
    return values.nanquantile(0.5, dim=1, keepdim=True)
