"""Measures of an evaluation and their uncertainty: intervals, area under the ROC curve, calibration, majority votes.

Everything in float64. An interval is 95 %. Shares of independent cases have Wilson's interval: the bootstrap of a share
that is 0 or 1 has no width at all, and at the few dozen cases of few-shot work it covers too little. All else, and
shares where one prompt has several cases, is bootstrapped over prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
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
    is None (one class missing) is left out; (NaN, NaN) where all are. For what sums decide, `bootstrap_sums` is faster.
    """
    place, sizes = _places(groups)
    ordered, starts = np.argsort(place, kind="stable"), sizes.cumsum() - sizes
    values = []
    for (drawn,) in _draws(len(sizes), seed, 1):
        size = sizes[drawn]
        within = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
        value = statistic(torch.from_numpy(ordered[np.repeat(starts[drawn], size) + within]))
        if value is not None:
            values.append(value)
    return percentile_interval(values)


def bootstrap_sums(terms: Tensor, groups: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """[N, K] terms of the cases -> [NUM_RESAMPLES, K], their sums in the same resamples as `bootstrap_interval`'s."""
    place, sizes = _places(groups)
    by_group = np.zeros((len(sizes), terms.shape[1]))
    np.add.at(by_group, place, terms.double().numpy())
    sums = []
    for drawn in _draws(len(sizes), seed, max(1, 2**20 // len(sizes))):
        cells = drawn + np.arange(len(drawn))[:, None] * len(sizes)
        times = np.bincount(cells.ravel(), minlength=cells.size).reshape(drawn.shape)  # each group in each resample
        sums.append(times @ by_group)
    return np.concatenate(sums)


def percentile_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % of the resamples' values; (NaN, NaN) of none."""
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _places(groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each case's group, by first appearance, and the groups' sizes."""
    numbers: dict[Hashable, int] = {}
    place = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return place, np.bincount(place, minlength=len(numbers))


def _draws(number: int, seed: int, at_once: int) -> Iterator[np.ndarray]:
    """Of each resample the groups drawn, int64 [at most `at_once`, number]; the same for any `at_once`."""
    generator = np.random.default_rng(seed)
    for first in range(0, NUM_RESAMPLES, at_once):
        yield generator.integers(0, number, (min(at_once, NUM_RESAMPLES - first), number))


def mean_estimate(values: Tensor, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Mean of the cases, bootstrapped over groups."""
    values = values.double()
    total, count = bootstrap_sums(torch.stack([values, torch.ones_like(values)], 1), groups, seed).T
    return Estimate(float(values.mean()), *percentile_interval(total / count), len(values))


def share_estimate(wins: Tensor, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Share of cases won, a tie one half: Wilson's interval where each group has one case, else bootstrapped.

    Where all cases agree a bootstrap has no width, so it is Wilson's of the number of groups.
    """
    number, total = len(set(groups)), float(wins.double().sum())
    share = total / len(wins)
    if number < len(groups) and share not in (0.0, 1.0):
        return mean_estimate(wins, groups, seed)
    return Estimate(share, *wilson_interval(share * number, number), len(wins))


def auroc(scores: Tensor, correct: Tensor) -> float | None:
    """Probability that a correct candidate has a higher score than a wrong one, ties one half; None without both."""
    right, wrong = scores[correct].double(), scores[~correct].double().sort().values
    if not len(right) or not len(wrong):
        return None
    below = torch.searchsorted(wrong, right, side="left") + torch.searchsorted(wrong, right, side="right")
    return float(below.double().mean() / (2 * len(wrong)))


def auroc_within(scores: Tensor, correct: Tensor, valid: Tensor) -> float | None:
    """The same over pairs of valid candidates of one prompt, [P, G] each: what a group's advantages are made of."""
    wins, pairs = pairs_within(scores, correct, valid).sum(0).tolist()
    return wins / pairs if pairs else None


def pairs_within(scores: Tensor, correct: Tensor, valid: Tensor) -> Tensor:
    """float64 [P, 2]: each prompt's pairs of a right and a wrong valid candidate: the won ones, and all."""
    pairs = (correct & valid)[:, :, None] & (~correct & valid)[:, None, :]
    scores = scores.double()
    wins = ((scores[:, :, None] - scores[:, None, :]).sign() + 1) / 2
    return torch.stack([torch.where(pairs, wins, 0.0).sum((1, 2)), pairs.sum((1, 2)).double()], 1)


def auroc_estimates(
    scores: Tensor, correct: Tensor, valid: Tensor, seed: int = 0
) -> tuple[Estimate | None, Estimate | None]:
    """(over all, within prompts) for the valid candidates [P, G], bootstrapped over prompts; None without both."""
    prompts, count = range(len(scores)), int(valid.sum())

    def overall(rows: Tensor) -> float | None:
        kept = valid[rows]
        return auroc(scores[rows][kept], correct[rows][kept])

    value = overall(torch.arange(len(scores)))
    over_all = None if value is None else Estimate(value, *bootstrap_interval(overall, prompts, seed), count)
    value = auroc_within(scores, correct, valid)
    if value is None:
        return over_all, None
    wins, pairs = bootstrap_sums(pairs_within(scores, correct, valid), prompts, seed).T
    return over_all, Estimate(value, *percentile_interval(wins[pairs > 0] / pairs[pairs > 0]), count)


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

    sums = torch.zeros(3, num_bins, dtype=torch.float64)
    sums.index_add_(1, place, torch.stack([torch.ones_like(p), confidence, right]))
    # Of each case, in its bin, by how much confidence is above what was right.
    excess = torch.zeros(len(p), num_bins, dtype=torch.float64).scatter_(
        1, place[:, None], (confidence - right)[:, None]
    )
    error = float(excess.sum(0).abs().sum() / len(p))
    resampled = bootstrap_sums(torch.cat([excess, torch.ones(len(p), 1)], 1), groups, seed)
    interval = percentile_interval(np.abs(resampled[:, :-1]).sum(1) / resampled[:, -1])
    bins = [CalibrationBin(int(n), float(c / n), float(r / n)) for n, c, r in sums.T if n > 0]
    brier = mean_estimate((1 - p).square(), groups, seed)
    return Calibration(Estimate(error, *interval, len(p)), brier, tuple(bins))


def majority_answer(answers: Sequence[str | None]) -> str | None:
    """The answer that most candidates of a problem give, after `normalize_answer`; of several the one given first.

    Candidates without an answer have no vote; None where no one has.
    """
    given = [answer for answer in answers if answer is not None]
    if not given:
        return None
    votes = Counter(normalize_answer(answer) for answer in given)
    return max(given, key=lambda answer: votes[normalize_answer(answer)])
