"""Measures of an evaluation and their uncertainty: intervals, area under the ROC curve, calibration, majority votes.

Everything in float64. An interval is 95 %. Shares of independent cases have Wilson's interval: the bootstrap of a share
that is 0 or 1 has no width at all, and at the few dozen cases of few-shot work it covers too little. All else, and
shares where one prompt has several cases, is bootstrapped over prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gem.data.answers import normalize_answer

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `count` cases (pairs, problems, candidates)."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions of like confidence: how many, their mean confidence, and the share of them that was right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Is sigma(beta * difference) the probability that the chosen answer is the better one?"""

    error: Estimate  # expected calibration error
    brier: Estimate
    bins: tuple[CalibrationBin, ...]  # those that are not empty, from 0.5 to 1


def wilson_interval(wins: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)   [Wilson 1927]."""
    share = wins / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_interval(
    statistic: Callable[[Tensor], float | None], groups: Sequence[Hashable], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `statistic(rows)` under resampling of whole groups (prompts) with replacement.

    rows: int64 indices into the cases; a group drawn twice brings its cases twice. A resample of which the statistic
    is None (one class missing) is left out; (NaN, NaN) where all are.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    ordered = np.array([row for rows in members.values() for row in rows])
    sizes = np.array([len(rows) for rows in members.values()])
    starts = sizes.cumsum() - sizes
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(NUM_RESAMPLES):
        drawn = generator.integers(0, len(sizes), len(sizes))
        size = sizes[drawn]
        within = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
        value = statistic(torch.from_numpy(ordered[np.repeat(starts[drawn], size) + within]))
        if value is not None:
            values.append(value)
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def mean_estimate(values: Tensor, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Mean of the cases, bootstrapped over groups."""
    values = values.double()
    interval = bootstrap_interval(lambda rows: float(values[rows].mean()), groups, seed)
    return Estimate(float(values.mean()), *interval, len(values))


def share_estimate(wins: Tensor, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Share of cases won, a tie one half: Wilson's interval where each group has one case, else bootstrapped."""
    if len(set(groups)) < len(groups):
        return mean_estimate(wins, groups, seed)
    total = float(wins.double().sum())
    return Estimate(total / len(wins), *wilson_interval(total, len(wins)), len(wins))


def auroc(scores: Tensor, correct: Tensor) -> float | None:
    """Probability that a correct candidate has a higher score than a wrong one, ties one half; None without both."""
    right, wrong = scores[correct].double(), scores[~correct].double().sort().values
    if not len(right) or not len(wrong):
        return None
    below = torch.searchsorted(wrong, right, side="left") + torch.searchsorted(wrong, right, side="right")
    return float(below.double().mean() / (2 * len(wrong)))


def auroc_within(scores: Tensor, correct: Tensor, valid: Tensor) -> float | None:
    """The same over pairs of valid candidates of one prompt, [P, G] each: what a group's advantages are made of."""
    pairs = (correct & valid)[:, :, None] & (~correct & valid)[:, None, :]
    scores = scores.double()
    wins = ((scores[:, :, None] - scores[:, None, :]).sign() + 1) / 2
    return float(wins[pairs].mean()) if bool(pairs.any()) else None


def auroc_estimates(
    scores: Tensor, correct: Tensor, valid: Tensor, seed: int = 0
) -> tuple[Estimate | None, Estimate | None]:
    """(over all, within prompts) for the valid candidates [P, G], bootstrapped over prompts; None without both."""

    def overall(rows: Tensor) -> float | None:
        kept = valid[rows]
        return auroc(scores[rows][kept], correct[rows][kept])

    def within(rows: Tensor) -> float | None:
        return auroc_within(scores[rows], correct[rows], valid[rows])

    prompts = range(len(scores))
    estimates = []
    for statistic in (overall, within):
        value = statistic(torch.arange(len(scores)))
        count = int(valid.sum())
        interval = () if value is None else bootstrap_interval(statistic, prompts, seed)
        estimates.append(None if value is None else Estimate(value, *interval, count))
    return estimates[0], estimates[1]


def calibration(
    differences: Tensor, beta: float, groups: Sequence[Hashable], *, num_bins: int = 10, seed: int = 0
) -> Calibration:
    """Calibration of p = sigma(beta * difference), difference = r(chosen) - r(rejected): [N] -> `Calibration`.

    Which answer is called chosen is known, so the question is put to the answer that p favours: with confidence
    c = max(p, 1 - p) it should be the chosen one in a share c of such pairs (p = 1/2: half a time).

        error = sum over bins of [1/2, 1] of n_bin / N * |mean c - share right|        brier = mean (1 - p)^2
    """
    p = torch.sigmoid(beta * differences.double())
    confidence, right = torch.maximum(p, 1 - p), ((p - 0.5).sign() + 1) / 2
    place = ((confidence - 0.5) * 2 * num_bins).long().clamp(0, num_bins - 1)

    def sums(rows: Tensor) -> Tensor:
        """Count, sum of confidence, sum of right answers of each bin: [3, num_bins]."""
        values = torch.stack([torch.ones_like(p), confidence, right])[:, rows]
        return torch.zeros(3, num_bins, dtype=torch.float64).index_add_(1, place[rows], values)

    def error(rows: Tensor) -> float:
        _, c, r = sums(rows)
        return float((c - r).abs().sum() / len(rows))

    def brier(rows: Tensor) -> float:
        return float((1 - p[rows]).square().mean())

    everything = torch.arange(len(p))
    estimates = [
        Estimate(statistic(everything), *bootstrap_interval(statistic, groups, seed), len(p))
        for statistic in (error, brier)
    ]
    bins = [CalibrationBin(int(n), float(c / n), float(r / n)) for n, c, r in sums(everything).T if n > 0]
    return Calibration(*estimates, tuple(bins))


def majority_answer(answers: Sequence[str | None]) -> str | None:
    """The answer that most candidates of a problem give, after `normalize_answer`; of several the one given first.

    Candidates without an answer have no vote; None where no one has.
    """
    given = [answer for answer in answers if answer is not None]
    if not given:
        return None
    votes = Counter(normalize_answer(answer) for answer in given)
    return max(given, key=lambda answer: votes[normalize_answer(answer)])
