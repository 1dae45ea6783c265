"""The score that the given pairs ask for: ridge logistic regression on differences of features, tested honestly.

    d = x(a+) - x(a-)      P(a+ better) = sigma(w . d / s)         Bradley and Terry 1952, with features
    s = root of the mean of d^2                                    the deviation of the differences in both orders, +-d,
                                                                   of the pairs or of the model's own candidates
    w = argmin  sum softplus(-w . d / s) + (l2 / 2) |w|^2          no intercept: a pair has no order
    S(a) = w . x(a) / s

Everything in float64 on the CPU; the same input gives the same result.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gem.calibration.features import CALIBRATED, DEFAULT_FEATURES, FEATURES, feature_array, feature_columns
from gem.calibration.score_file import Platt, Samples, Score, Verdict
from gem.calibration.verdict import (
    MIN_PROMPTS,
    TRAINED_ON,
    PairFeatures,
    check_pairs,
    judge,
    judge_own,
    pair_accuracy,
    plain_margins,
    verdict_on_others,
)
from gem.errors import UserError
from gem.statistics import NUM_RESAMPLES, Estimate

# Strengths that are tried, the strongest first, so that of equals the strongest is taken. Decades are fine enough: the
# held-out loss hardly changes within one.
STRENGTHS = (1000.0, 100.0, 10.0, 1.0, 0.1)
INNER_FOLDS = 5
# With fewer than MIN_PROMPTS prompts cross-validation chooses by chance: this is taken.
DEFAULT_STRENGTH = 1.0
# Prompts x pairs up to which each prompt is left out alone (632 pairs of as many prompts); beyond, prompts are left out
# in so many groups that groups x pairs stays below it, at least 10.
MAX_HELD_OUT = 400_000
# A feature whose differences are this small beside its values is constant up to fp32's rounding: it gets weight 0.
CONSTANT = 1e-6


@dataclass(frozen=True)
class PairCalibration:
    """A score fitted to N pairs and what pairs say of it. Arrays follow `features`."""

    features: tuple[str, ...]
    weights: np.ndarray  # [F], of standardised differences
    weight_intervals: np.ndarray  # [F, 2], 95 %
    scales: np.ndarray  # [F]
    l2: float
    held_out: np.ndarray  # [N] S(a+) - S(a-) by a score fitted without the pair's prompt
    held_out_weights: np.ndarray  # [N, F] of that score: S = held_out_weights . x
    prompts: tuple[Hashable, ...]  # [N]
    num_prompts: int  # of the pairs that it was tested on
    pair_accuracy: dict[str, Estimate]
    verdict: Verdict
    scales_from: Literal["candidates", "pairs"] = "pairs"
    own: PairFeatures | None = None  # the pairs, where they are of the model's own answers

    @property
    def fitted_to(self) -> Literal["candidates", "pairs"]:
        return "pairs" if self.own is None else "candidates"

    @property
    def linear(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """(names, weights / scales): what a linear score of raw features needs."""
        return self.features, tuple((self.weights / self.scales).tolist())

    def unseen_weights(self, prompts: Sequence[Hashable]) -> np.ndarray:
        """Weights of raw features, [N, F]: for a prompt that was fitted on those of the score fitted without it."""
        return _unseen_weights(self.prompts, self.held_out_weights, self.weights / self.scales, prompts)

    def verdict_after_sft(self, others: PairFeatures | None, *, fork_weight: float = 1.0, seed: int = 0) -> Verdict:
        """The verdict where SFT has trained on the given pairs' chosen answers: by what neither has seen.

        That are held-out pairs, `others`, and the model's own right and wrong answers, each prompt held out.
        """
        margins = None
        if others is not None:
            differences = (others.chosen - others.rejected)[:, feature_columns(self.features)]
            margins = (differences * self.unseen_weights(others.prompts)).sum(1)
        if self.own is not None:
            which = "that neither it nor SFT was fitted to"
            return judge_own(
                self.own, self.held_out, others, margins, fork_weight=fork_weight, seed=seed, which=which
            )[1]  # fmt: skip
        found = None if others is None or margins is None else pair_accuracy(margins, others.prompts, seed)
        return verdict_on_others(self.verdict, found, TRAINED_ON)

    def score(
        self,
        *,
        model: str,
        pairs_hash: str,
        top_m: float | int = 0.1,
        platt: Platt | None = None,
        samples: Samples | None = None,
    ) -> Score:
        """As `write_score` takes it."""

        def named(values: np.ndarray) -> dict[str, Any]:
            return dict(zip(self.features, values.tolist()))

        return Score(
            features=list(self.features),
            weights=named(self.weights),
            weight_intervals={name: tuple(pair) for name, pair in named(self.weight_intervals).items()},
            scales=named(self.scales),
            top_m=top_m,
            l2=self.l2,
            model=model,
            pairs_hash=pairs_hash,
            num_pairs=self.pair_accuracy[CALIBRATED].count,
            num_prompts=self.num_prompts,
            verdict=self.verdict,
            pair_accuracy=self.pair_accuracy,
            platt=platt,
            samples=samples,
            scales_from=self.scales_from,
            fitted_to=self.fitted_to,
        )


def calibrate(
    chosen: Any,
    rejected: Any,
    prompts: Sequence[Hashable],
    *,
    features: Sequence[str] = DEFAULT_FEATURES,
    fork_weight: float = 1.0,
    seed: int = 0,
    scales: np.ndarray | None = None,
    given: PairFeatures | None = None,
) -> PairCalibration:
    """Fits the score to the pairs and tests it on prompts that it has not seen.

    The strength l2 is the one of `STRENGTHS` with the smallest log-loss in `INNER_FOLDS`-fold cross-validation over
    prompts. The calibrated score's pair accuracy is leave-one-prompt-out: scales, strength (again by cross-validation,
    among the other prompts) and weights are found without the prompt whose pairs are judged. Beyond `MAX_HELD_OUT`
    prompts are left out in groups. Intervals of the weights are a bootstrap over prompts at
    the chosen strength and scales.

    Args:
        chosen, rejected: [N, 9] tensors or arrays, features in the order of `FEATURES`.
        prompts: [N], equal for pairs of the same prompt; these stay together in every split.
        features: which of them the score is made of.
        fork_weight: lambda of the paper's score, which is reported beside it.
        seed: of the bootstraps.
        scales: [9], in the order of `FEATURES`: `candidate_scales` of the model's own candidates. None: of the pairs.
            They need no label, so they are the same in every fit, the held-out ones included.
        given: then the pairs fitted to are a right and a wrong answer of the model's own, and these are the given ones,
            which the score is only tested on: pair accuracies and verdict are of both. A prompt with many pairs of its
            own weighs as one with few: each pair's loss counts 1 / (pairs of its prompt).

    Raises:
        UserError: wrong shapes, unknown features, fewer than two prompts, or a feature that is not finite.

    Example:
        fitted = calibrate(features(chosen), features(rejected), prompt_ids)
        print(fitted.verdict.words)
        write_score(fitted.score(model="runs/sft/model", pairs_hash=hash_pairs(pairs)), "score.json")
    """
    better, worse = feature_array(chosen, "chosen"), feature_array(rejected, "rejected")
    columns = feature_columns(features)
    groups = check_pairs(better, worse, prompts)
    differences = (better - worse)[:, columns]
    sizes = np.maximum(np.abs(better), np.abs(worse))[:, columns]

    fixed = None if scales is None else _check_scales(scales)[columns]
    counts = np.ones(len(groups)) if given is None else 1 / np.bincount(groups)[groups]
    l2 = float(_choose_strengths(differences, sizes, groups, counts[None], fixed)[0])
    found = _scales(differences, sizes, counts[None], fixed)[0]
    weights = _fit(differences / found, l2, counts)
    intervals = _weight_intervals(differences, found, l2, groups, counts, seed)
    held_out_weights = _held_out_weights(differences, sizes, groups, counts, fixed)
    held_out = (differences * held_out_weights).sum(1)

    own = None if given is None else PairFeatures(better, worse, list(prompts))
    if own is None or given is None:
        tested = list(prompts)
        margins = plain_margins(better, worse, fork_weight) | {CALIBRATED: held_out}
        accuracy = {name: pair_accuracy(margin, tested, seed) for name, margin in margins.items()}
        verdict = judge(margins, accuracy, tested, seed)
    else:
        tested = [*prompts, *given.prompts]
        unseen = _unseen_weights(prompts, held_out_weights, weights / found, given.prompts)
        others = ((given.chosen - given.rejected)[:, columns] * unseen).sum(1)
        accuracy, verdict = judge_own(own, held_out, given, others, fork_weight=fork_weight, seed=seed)
    return PairCalibration(
        features=tuple(features),
        weights=weights,
        weight_intervals=intervals,
        scales=np.where(np.isfinite(found), found, 1.0),
        l2=l2,
        held_out=held_out,
        held_out_weights=held_out_weights,
        prompts=tuple(prompts),
        num_prompts=len(set(tested)),
        pair_accuracy=accuracy,
        verdict=verdict,
        scales_from="pairs" if fixed is None else "candidates",
        own=own,
    )


def candidate_scales(values: Any, valid: Any) -> np.ndarray:
    """Root mean square of the differences within prompts of the model's own candidates: [P, G, 9], [P, G] -> [9].

        s^2 = mean over prompts and over pairs i < j of valid candidates of (x_i - x_j)^2

    What a score has to tell apart at work is these, so they say what a large difference is. Both answers of a given
    pair are well written, so theirs may be far smaller or larger. Infinity, which makes the weight 0, where candidates
    do not differ (up to fp32's rounding).

    Raises:
        UserError: no prompt has two valid candidates, or a feature of one is not finite.
    """
    features, kept = feature_array(values, "candidates"), np.asarray(valid, bool)
    if kept.shape != features.shape[:-1] or kept.ndim != 2:
        raise UserError(f"candidates: expected features [P, G, 9] and valid [P, G], got {features.shape}, {kept.shape}")
    if not np.isfinite(features[kept]).all():
        raise UserError(
            "candidates: a feature is not finite; the model's logits hold NaN or infinity: load it in float32"
        )
    squares, sizes, number = np.zeros(len(FEATURES)), np.zeros(len(FEATURES)), 0
    for group, ok in zip(features, kept):
        own = group[ok]
        first, second = np.triu_indices(len(own), 1)
        squares += ((own[first] - own[second]) ** 2).sum(0)
        sizes += (np.maximum(np.abs(own[first]), np.abs(own[second])) ** 2).sum(0)
        number += len(first)
    if not number:
        raise UserError(
            "candidates: no prompt has two valid candidates to take scales from; sample more of each, or longer ones, "
            "or none (scales are then those of the pairs)"
        )
    return np.where(squares > CONSTANT**2 * sizes, np.sqrt(squares / number), np.inf)


def _check_scales(scales: np.ndarray) -> np.ndarray:
    found = np.asarray(scales, np.float64)
    if found.shape != (len(FEATURES),) or not (found > 0).all():
        raise UserError(f"scales: expected {len(FEATURES)} numbers above 0, in the order of FEATURES, got {scales}")
    return found


def _scales(
    differences: np.ndarray, sizes: np.ndarray, counts: np.ndarray, fixed: np.ndarray | None = None
) -> np.ndarray:
    """s of the rows that each fit counts, [K, F]; infinity, which makes the weight 0, where they do not differ.

    fixed [F]: s itself.
    """
    if fixed is not None:
        return np.tile(fixed, (len(counts), 1))
    total = counts.sum(1, keepdims=True)
    scales = np.sqrt(counts @ differences**2 / total)
    return np.where(scales > CONSTANT * np.sqrt(counts @ sizes**2 / total), scales, np.inf)


def _fit(scaled: np.ndarray, l2: float, counts: np.ndarray) -> np.ndarray:
    """w [F] of standardised differences. Each pair stands there in both orders, so its loss counts twice."""
    from sklearn.linear_model import LogisticRegression  # a second of imports, for who calibrates

    model = LogisticRegression(C=1 / (2 * l2), fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=1000)
    both = np.concatenate([scaled, -scaled])
    return model.fit(both, np.repeat([1, 0], len(scaled)), sample_weight=np.tile(counts, 2)).coef_[0]


def _refit(differences: np.ndarray, counts: np.ndarray, scales: np.ndarray, l2: np.ndarray) -> np.ndarray:
    """w of `_fit` for K weightings of the same pairs at once: counts [K, N], scales [K, F], l2 [K] -> [K, F].

    The tests behind one score are thousands of fits of some hundred rows, of which scikit-learn takes milliseconds
    each. Newton's method on all of them; a step is shortened until no margin moves by more than 1 (the curvature of
    log sigma then changes by less than what would undo the descent), so it converges from anywhere.
    """
    size = 1 + 2_000_000 // len(differences)
    parts = [
        _newton(differences, counts[i : i + size], scales[i : i + size], l2[i : i + size, None])
        for i in range(0, len(counts), size)
    ]
    return np.concatenate(parts)


def _newton(differences: np.ndarray, counts: np.ndarray, scales: np.ndarray, l2: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    size = differences.shape[1]
    products = (differences[:, :, None] * differences[:, None, :]).reshape(len(differences), -1)
    outer = scales[:, :, None] * scales[:, None, :]
    weights = np.zeros_like(scales)
    for _ in range(1000):
        wrong = expit(-(weights / scales) @ differences.T)
        gradient = (counts * wrong) @ differences / scales - l2 * weights
        curvature = ((counts * wrong * (1 - wrong)) @ products).reshape(-1, size, size) / outer
        step = np.linalg.solve(curvature + l2[:, :, None] * np.eye(size), gradient[:, :, None])[:, :, 0]
        moved = (np.abs((step / scales) @ differences.T) * (counts > 0)).max(1, keepdims=True)
        weights = weights + step / np.maximum(moved, 1)
        if (np.abs(step) <= 1e-9 * (1 + np.abs(weights))).all():
            return weights
    raise RuntimeError("the logistic regression did not converge in 1000 steps")


def _choose_strengths(
    differences: np.ndarray,
    sizes: np.ndarray,
    groups: np.ndarray,
    counts: np.ndarray,
    fixed: np.ndarray | None = None,
    least: int = MIN_PROMPTS,
) -> np.ndarray:
    """The strength with the smallest held-out log-loss for each choice of rows, those whose counts [K, N] are above 0:
    [K]. Of fewer than `least` prompts it is `DEFAULT_STRENGTH`."""
    from sklearn.model_selection import GroupKFold

    tasks, rows_of = [], []
    for k, kept in enumerate(counts > 0):
        rows = np.flatnonzero(kept)
        number = len(np.unique(groups[rows]))
        if number < least:
            continue
        for train, test in GroupKFold(min(INNER_FOLDS, number)).split(rows, groups=groups[rows]):
            tasks.append(k)
            rows_of.append((rows[train], rows[test]))
    chosen = np.full(len(counts), DEFAULT_STRENGTH)
    if not tasks:
        return chosen
    inner, test = np.zeros((2, len(tasks), len(groups)))
    for i, (train_rows, test_rows) in enumerate(rows_of):
        inner[i, train_rows], test[i, test_rows] = counts[tasks[i], train_rows], counts[tasks[i], test_rows]
    scales = _scales(differences, sizes, inner, fixed)
    losses = np.zeros((len(counts), len(STRENGTHS)))
    for j, l2 in enumerate(STRENGTHS):
        weights = _refit(differences, inner, scales, np.full(len(inner), l2))
        loss = np.logaddexp(0, -(weights / scales) @ differences.T)
        np.add.at(losses[:, j], tasks, (test * loss).sum(1))
    tried = np.unique(tasks)
    chosen[tried] = np.array(STRENGTHS)[losses[tried].argmin(1)]
    return chosen


def _held_out_weights(
    differences: np.ndarray,
    sizes: np.ndarray,
    groups: np.ndarray,
    pair_counts: np.ndarray,
    fixed: np.ndarray | None,
) -> np.ndarray:
    """Weights of raw features, w / s, of the score that knows nothing of the pair's prompt, [N, F]."""
    from sklearn.model_selection import GroupKFold

    number = int(groups.max()) + 1
    num_folds = min(number, max(10, MAX_HELD_OUT // len(groups)))
    folds = [test for _, test in GroupKFold(num_folds).split(groups, groups=groups)]
    counts = np.tile(pair_counts, (len(folds), 1))
    for k, test in enumerate(folds):
        counts[k, test] = 0
    # A prompt fewer than the score itself has: its strength is chosen as the score's own is.
    strengths = _choose_strengths(differences, sizes, groups, counts, fixed, MIN_PROMPTS - 1)
    scales = _scales(differences, sizes, counts, fixed)
    weights = _refit(differences, counts, scales, strengths) / scales
    found = np.empty(differences.shape)
    for k, test in enumerate(folds):
        found[test] = weights[k]
    return found


def _unseen_weights(
    fitted: Sequence[Hashable], held_out: np.ndarray, weights: np.ndarray, prompts: Sequence[Hashable]
) -> np.ndarray:
    rows = {prompt: row for row, prompt in enumerate(fitted)}
    return np.stack([held_out[rows[prompt]] if prompt in rows else weights for prompt in prompts])


def _weight_intervals(
    differences: np.ndarray, scales: np.ndarray, l2: float, groups: np.ndarray, pair_counts: np.ndarray, seed: int
) -> np.ndarray:
    """95 % percentile intervals of w over resampled prompts, [F, 2]."""
    number = int(groups.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), NUM_RESAMPLES)
    counts = drawn[:, groups] * pair_counts
    weights = _refit(differences, counts, np.tile(scales, (NUM_RESAMPLES, 1)), np.full(NUM_RESAMPLES, l2))
    return np.quantile(weights, [0.025, 0.975], axis=0).T
