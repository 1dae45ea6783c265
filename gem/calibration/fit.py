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
import torch

from gem.calibration.features import (
    CALIBRATED,
    DEFAULT_FEATURES,
    FEATURES,
    LONGER,
    SHORTER,
    feature_array,
    feature_columns,
    linear_score,
    plain_scores,
)
from gem.calibration.score_file import Platt, Samples, Score, Verdict
from gem.errors import UserError
from gem.statistics import NUM_RESAMPLES, Estimate, mean_estimate, share_estimate, wilson_interval

# Strengths that are tried, the strongest first, so that of equals the strongest is taken. Decades are fine enough: the
# held-out loss hardly changes within one.
STRENGTHS = (1000.0, 100.0, 10.0, 1.0, 0.1)
INNER_FOLDS = 5
# With fewer prompts cross-validation chooses by chance: DEFAULT_STRENGTH is taken, and no verdict is `informative`.
MIN_PROMPTS = 8
MIN_HELD_OUT = 16  # pairs that SFT has not seen, which then decide in place of those that it has
DEFAULT_STRENGTH = 1.0
# Prompts x pairs up to which each prompt is left out alone (632 pairs of as many prompts); beyond, prompts are left out
# in so many groups that groups x pairs stays below it, at least 10.
MAX_HELD_OUT = 400_000
# A feature whose differences are this small beside its values is constant up to fp32's rounding: it gets weight 0.
CONSTANT = 1e-6
# Which pairs a verdict is about, in its words.
HELD_OUT, OWN = "it was not fitted on", "a right and a wrong answer of the model's own"
# How the words of a verdict call a share of pairs.
MODERATE, STRONG = 0.65, 0.8


@dataclass(frozen=True)
class PairFeatures:
    """Features of pairs [N, 9] float64, in the order of `FEATURES`, and the prompt of each."""

    chosen: np.ndarray
    rejected: np.ndarray
    prompts: list[Hashable]


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
    fitted_to: Literal["candidates", "pairs"] = "pairs"

    @property
    def linear(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """(names, weights / scales): what a linear score of raw features needs."""
        return self.features, tuple((self.weights / self.scales).tolist())

    def unseen_weights(self, prompts: Sequence[Hashable]) -> np.ndarray:
        """Weights of raw features, [N, F]: for a prompt that was fitted on those of the score fitted without it."""
        return _unseen_weights(self.prompts, self.held_out_weights, self.weights / self.scales, prompts)

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
    groups = _check_pairs(better, worse, prompts)
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

    tested, which, judged = list(prompts), HELD_OUT, held_out
    if given is not None:
        which = f"{HELD_OUT} ({len(groups)} of them {OWN})"
        tested += given.prompts
        unseen = _unseen_weights(prompts, held_out_weights, weights / found, given.prompts)
        judged = np.concatenate([held_out, ((given.chosen - given.rejected)[:, columns] * unseen).sum(1)])
        better, worse = np.concatenate([better, given.chosen]), np.concatenate([worse, given.rejected])
    margins = _plain_margins(better, worse, fork_weight) | {CALIBRATED: judged}
    accuracy = {name: pair_accuracy(margin, tested, seed) for name, margin in margins.items()}
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
        verdict=judge(margins, accuracy, tested, seed, which),
        scales_from="pairs" if fixed is None else "candidates",
        fitted_to="pairs" if given is None else "candidates",
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


def pair_accuracy(margins: np.ndarray, prompts: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Share of pairs with S(a+) > S(a-), a tie one half; 95 % interval.

    Wilson's where each prompt has one pair, else a bootstrap over prompts; where all pairs agree a bootstrap has no
    width, so it is Wilson's of the number of prompts.
    """
    found = share_estimate(pair_wins(margins), prompts, seed)
    if found.value in (0.0, 1.0):
        number = len(set(prompts))
        return Estimate(found.value, *wilson_interval(found.value * number, number), found.count)
    return found


def judge(
    margins: dict[str, np.ndarray],
    accuracy: dict[str, Estimate],
    prompts: Sequence[Hashable],
    seed: int = 0,
    which: str = HELD_OUT,
) -> Verdict:
    """The verdict on the calibrated score, or on another in its place. which: pairs, in the words of the verdict.

    not_informative       the 95 % interval of its held-out pair accuracy holds 0.5 (or lies below), or there are fewer
                          than `MIN_PROMPTS` prompts
    explained_by_length   the interval of length alone, in its better direction, excludes 0.5, and that of the paired
                          difference (calibrated - length alone) does not lie above 0
    informative           else
    """
    found = accuracy[CALIBRATED]
    number = len(set(prompts))
    counts = f"{found.count} pairs" if number == found.count else f"{found.count} pairs of {number} prompts"
    told = f"It prefers the better answer in {_words(found)} of {counts} {which}; chance is 0.5."
    if number < MIN_PROMPTS:
        return Verdict(
            kind="not_informative",
            words=f"Not informative: {number} prompts are too few to tell, at least {MIN_PROMPTS} are needed. {told}",
        )
    if found.low <= 0.5:
        more = "the interval holds 0.5" if found.high >= 0.5 else "worse than chance"
        words = f"Not informative: {more}. {told} These pairs do not show that the score tells better from worse."
        return Verdict(kind="not_informative", words=words)
    direction = LONGER if accuracy[LONGER].value > accuracy[SHORTER].value else SHORTER
    length = accuracy[direction]
    alone = f"Length alone ({'longer' if direction == LONGER else 'shorter'} is better) does so in {_words(length)}"
    gain = mean_estimate(pair_wins(margins[CALIBRATED]) - pair_wins(margins[direction]), prompts, seed)
    difference = f"the difference is {_words(gain, '+.2f')}"
    if length.low > 0.5 and gain.low <= 0:
        words = f"Explained by length. {told} {alone}: {difference}, so these pairs show nothing beyond length."
        return Verdict(kind="explained_by_length", words=words)
    return Verdict(kind="informative", words=f"Informative, {_strength(found)}. {told} {alone}: {difference}.")


def verdict_after_sft(verdict: Verdict, held_out: Estimate | None) -> Verdict:
    """The verdict on a score fitted to, or tested on, pairs whose chosen answers SFT has trained on.

    Of such pairs any score that knows probable answers prefers the chosen ones. So `held_out`, the pair accuracy on
    pairs that SFT has not seen, decides where there are `MIN_HELD_OUT` of them; its value says how strong the score is.
    """
    if verdict.kind != "informative":
        return verdict
    seen = f"On the given pairs, whose chosen answers SFT has trained on: {verdict.words[0].lower()}{verdict.words[1:]}"
    if held_out is None or held_out.count < MIN_HELD_OUT:
        words = (
            f"{verdict.words} SFT has trained on the chosen answers of these pairs, so this may be too high; an "
            f"eval_file of at least {MIN_HELD_OUT} other pairs would tell."
        )
        return Verdict(kind="informative", words=words)
    told = f"It prefers the better answer in {_words(held_out)} of {held_out.count} held-out pairs; chance is 0.5."
    if held_out.low <= 0.5:
        more = "the interval holds 0.5" if held_out.high >= 0.5 else "worse than chance"
        return Verdict(kind="not_informative", words=f"Not informative: {more}. {told} {seen}")
    return Verdict(kind="informative", words=f"Informative, {_strength(held_out)}. {told} {seen}")


def _strength(found: Estimate) -> str:
    return "strong" if found.value >= STRONG else "moderate" if found.value >= MODERATE else "weak"


def _words(estimate: Estimate, form: str = ".2f") -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def pair_wins(margins: np.ndarray) -> torch.Tensor:
    """1 where S(a+) > S(a-), 0 where it is the other way, a tie one half: float64, shaped like the margins."""
    return torch.from_numpy((np.sign(margins) + 1) / 2)


def fixed_score_verdict(
    chosen: Any,
    rejected: Any,
    prompts: Sequence[Hashable],
    linear: tuple[Sequence[str], Sequence[float]],
    *,
    which: str,
    seed: int = 0,
) -> tuple[dict[str, Estimate], Verdict]:
    """(pair accuracies, verdict) of a score that is there already, under the name of the calibrated one.

    linear: (names, weights) for `linear_score`. which: "given pairs", in the words of the verdict.
    """
    better, worse = feature_array(chosen, "chosen"), feature_array(rejected, "rejected")
    groups = _check_pairs(better, worse, prompts).tolist()
    margins = _plain_margins(better, worse, 1.0)
    margins[CALIBRATED] = linear_score(better, *linear) - linear_score(worse, *linear)
    accuracy = {name: pair_accuracy(margins[name], groups, seed) for name in (CALIBRATED, LONGER, SHORTER)}
    return accuracy, judge(margins, accuracy, groups, seed, which)


def _plain_margins(better: np.ndarray, worse: np.ndarray, fork_weight: float) -> dict[str, np.ndarray]:
    chosen, rejected = plain_scores(better, fork_weight), plain_scores(worse, fork_weight)
    return {name: chosen[name] - rejected[name] for name in chosen}


def _check_pairs(better: np.ndarray, worse: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """The prompts as numbers from 0, [N]."""
    if better.ndim != 2 or better.shape != worse.shape or len(prompts) != len(better):
        raise UserError(
            f"pairs: expected chosen and rejected [N, {len(FEATURES)}] and N prompts, got {list(better.shape)}, "
            f"{list(worse.shape)} and {len(prompts)}; give one row a pair"
        )
    for side, values in (("chosen", better), ("rejected", worse)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0].tolist()
            raise UserError(
                f"pairs: {FEATURES[column]} of the {side} answer of pair {row} (counted from 0) is "
                f"{values[row, column]}, expected a finite number; leave the pair out or look at its answer"
            )
    places: dict[Hashable, int] = {}
    groups = np.array([places.setdefault(prompt, len(places)) for prompt in prompts], np.int64)
    if len(places) < 2:
        raise UserError(
            f"pairs: expected pairs of at least 2 prompts, got {len(places)}; "
            "a score is tested on a prompt that it was not fitted on: add pairs"
        )
    return groups


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
) -> np.ndarray:
    """The strength with the smallest held-out log-loss for each choice of rows, those whose counts [K, N] are above 0:
    [K]."""
    from sklearn.model_selection import GroupKFold

    tasks, rows_of = [], []
    for k, kept in enumerate(counts > 0):
        rows = np.flatnonzero(kept)
        number = len(np.unique(groups[rows]))
        if number < MIN_PROMPTS:
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
    strengths = _choose_strengths(differences, sizes, groups, counts, fixed)
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
