"""From scores to probabilities: what pairs can say of a group's candidates, and what labelled samples can say of one.

Pairs say how much better one answer is than another. They hold no right or wrong, so no probability that one answer is
right comes from them: the intercept that this needs cancels in every difference. What they give is the probability of
being the preferred one, `preference_probabilities`. Where samples are known to be right or wrong, Platt's two numbers
turn a score into a probability of being right, `fit_platt`; it holds for samples of the same model on like prompts.
"""

from __future__ import annotations

import numpy as np

from gem.calibration.score_file import Platt, ReliabilityBin

FOLDS = 5
NUM_BINS = 10


def preference_probabilities(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """P(i is preferred to all others of its group) = softmax over the valid candidates (Luce 1959): [P, G] each.

    For two candidates it is sigma(S_1 - S_2), what the pairs were fitted with. Not a probability of being right: in a
    group in which all are wrong it still sums to 1. Invalid candidates, and groups without a valid one, have 0.
    """
    shifted = np.where(valid, scores, -np.inf)
    top = shifted.max(1, keepdims=True)
    exponentials = np.exp(shifted - np.where(np.isfinite(top), top, 0.0))
    return exponentials / np.maximum(exponentials.sum(1, keepdims=True), 1.0)


def fit_platt(scores: np.ndarray, correct: np.ndarray, valid: np.ndarray) -> Platt | None:
    """P(right) = sigma(slope * S + intercept) by maximum likelihood on valid samples [P, G] (Platt 1999).

    Platt's targets, (n_right + 1) / (n_right + 2) for right ones and 1 / (n_wrong + 2) for wrong ones, keep the
    probabilities off 0 and 1. None where the samples bear no such statement: all right, all wrong, all of one score,
    or a slope that is not positive (a higher score then does not mean right, whatever it says within a prompt).
    """
    from sklearn.linear_model import LogisticRegression  # a second of imports, for who calibrates

    values, right = scores[valid], correct[valid]
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong or np.ptp(values) <= 1e-9 * np.abs(values).max():
        return None
    centre, scale = values.mean(), values.std()
    target = np.where(right, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    standardised = np.tile((values - centre) / scale, 2)[:, None]
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8, max_iter=1000)
    model.fit(standardised, np.repeat([1, 0], len(values)), np.concatenate([target, 1 - target]))
    slope = float(model.coef_[0, 0]) / scale
    if slope <= 0:
        return None
    return Platt(slope=slope, intercept=float(model.intercept_[0]) - slope * centre, count=len(values))


def right_probabilities(platt: Platt, scores: np.ndarray) -> np.ndarray:
    """sigma(slope * S + intercept), any shape."""
    from scipy.special import expit

    return expit(platt.slope * scores + platt.intercept)


def reliability(scores: np.ndarray, correct: np.ndarray, valid: np.ndarray) -> list[ReliabilityBin]:
    """Predicted against true share right, in `NUM_BINS` equal bins of [0, 1], those that are not empty.

    Each prompt's samples are predicted by Platt's numbers fitted on other prompts, in up to `FOLDS` groups of prompts.
    Empty with one prompt, or where one of the fits says nothing.
    """
    from sklearn.model_selection import GroupKFold

    if len(scores) < 2:
        return []
    predicted = np.zeros(scores.shape)
    for train, test in GroupKFold(min(FOLDS, len(scores))).split(scores, groups=np.arange(len(scores))):
        platt = fit_platt(scores[train], correct[train], valid[train])
        if platt is None:
            return []
        predicted[test] = right_probabilities(platt, scores[test])
    p, right = predicted[valid], correct[valid]
    place = np.minimum((p * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return [
        ReliabilityBin(count=int(here.sum()), confidence=float(p[here].mean()), share_right=float(right[here].mean()))
        for here in (place == i for i in range(NUM_BINS))
        if here.any()
    ]
