"""What pairs say of a score: the share of them that it gets right, and a verdict in words."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gem.calibration.features import (
    CALIBRATED,
    FEATURES,
    LONGER,
    SHORTER,
    feature_array,
    linear_score,
    plain_scores,
)
from gem.calibration.score_file import Verdict
from gem.errors import UserError
from gem.statistics import Estimate, mean_estimate, share_estimate

MIN_PROMPTS = 8  # with fewer no verdict is `informative`
MIN_HELD_OUT = 16  # other pairs, which then decide in place of those that SFT has trained on or the score is fitted to
# What was done with given pairs, in the words of a verdict.
TRAINED_ON, FITTED_TO = "whose chosen answers SFT has trained on", "that the score may have been fitted to"
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


def pair_accuracy(margins: np.ndarray, prompts: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Share of pairs with S(a+) > S(a-), a tie one half; 95 % interval of `share_estimate`, over prompts."""
    return share_estimate(pair_wins(margins), prompts, seed)


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


def judge_own(
    own: PairFeatures,
    held_out: np.ndarray,
    others: PairFeatures | None,
    other_margins: np.ndarray | None,
    *,
    fork_weight: float = 1.0,
    seed: int = 0,
    which: str = HELD_OUT,
) -> tuple[dict[str, Estimate], Verdict]:
    """(pair accuracies, verdict) of a score fitted to right and wrong answers of the model's own.

    It is tested on these, each prompt held out (margins `held_out` [N]), and on `others` (margins `other_margins` [M]),
    to which it was not fitted. Own answers are what it is for: where it gets half of their pairs right or fewer it is
    not informative, whatever the others say. which: all these pairs, in the words of the verdict.
    """
    parts, judged = [own], [held_out]
    if others is not None and other_margins is not None:
        check_finite(others.chosen, others.rejected)
        parts.append(others)
        judged.append(other_margins)
    prompts = [prompt for part in parts for prompt in part.prompts]
    better, worse = (np.concatenate([getattr(part, side) for part in parts]) for side in ("chosen", "rejected"))
    margins = plain_margins(better, worse, fork_weight) | {CALIBRATED: np.concatenate(judged)}
    accuracy = {name: pair_accuracy(margin, prompts, seed) for name, margin in margins.items()}
    verdict = judge(margins, accuracy, prompts, seed, f"{which} ({len(own.prompts)} of them {OWN})")
    alone = pair_accuracy(held_out, own.prompts, seed)
    kind, words = verdict.kind, f"{verdict.words} Of its own alone: {_words(alone)}."
    if kind == "informative" and alone.value <= 0.5:
        kind = "not_informative"
        words = f"Not informative: of the model's own answers it prefers no better ones. {words}"
    return accuracy, Verdict(kind=kind, words=words)


def verdict_on_others(verdict: Verdict, held_out: Estimate | None, seen: str) -> Verdict:
    """The verdict on a score tested on pairs that say too much for it: `seen` is why, in words that follow "pairs".

    SFT has trained on their chosen answers, so any score that knows probable answers prefers these; or the score was
    fitted to them. So `held_out`, the pair accuracy on other pairs, decides where there are `MIN_HELD_OUT` of them; its
    value says how strong the score is.
    """
    if verdict.kind != "informative":
        return verdict
    if held_out is None or held_out.count < MIN_HELD_OUT:
        words = (
            f"{verdict.words} These are pairs {seen}, so this may be too high; an eval_file of at least {MIN_HELD_OUT} "
            "other pairs would tell."
        )
        return Verdict(kind="informative", words=words)
    before = f"On the given pairs, {seen}: {verdict.words[0].lower()}{verdict.words[1:]}"
    told = f"It prefers the better answer in {_words(held_out)} of {held_out.count} held-out pairs; chance is 0.5."
    if held_out.low <= 0.5:
        more = "the interval holds 0.5" if held_out.high >= 0.5 else "worse than chance"
        return Verdict(kind="not_informative", words=f"Not informative: {more}. {told} {before}")
    return Verdict(kind="informative", words=f"Informative, {_strength(held_out)}. {told} {before}")


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
    groups = check_pairs(better, worse, prompts).tolist()
    margins = plain_margins(better, worse, 1.0)
    margins[CALIBRATED] = linear_score(better, *linear) - linear_score(worse, *linear)
    accuracy = {name: pair_accuracy(margins[name], groups, seed) for name in (CALIBRATED, LONGER, SHORTER)}
    return accuracy, judge(margins, accuracy, groups, seed, which)


def plain_margins(better: np.ndarray, worse: np.ndarray, fork_weight: float) -> dict[str, np.ndarray]:
    chosen, rejected = plain_scores(better, fork_weight), plain_scores(worse, fork_weight)
    return {name: chosen[name] - rejected[name] for name in chosen}


def check_pairs(better: np.ndarray, worse: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """The prompts as numbers from 0, [N]."""
    if better.ndim != 2 or better.shape != worse.shape or len(prompts) != len(better):
        raise UserError(
            f"pairs: expected chosen and rejected [N, {len(FEATURES)}] and N prompts, got {list(better.shape)}, "
            f"{list(worse.shape)} and {len(prompts)}; give one row a pair"
        )
    check_finite(better, worse)
    places: dict[Hashable, int] = {}
    groups = np.array([places.setdefault(prompt, len(places)) for prompt in prompts], np.int64)
    if len(places) < 2:
        raise UserError(
            f"pairs: expected pairs of at least 2 prompts, got {len(places)}; "
            "a score is tested on a prompt that it was not fitted on: add pairs"
        )
    return groups


def check_finite(better: np.ndarray, worse: np.ndarray) -> None:
    for side, values in (("chosen", better), ("rejected", worse)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0].tolist()
            raise UserError(
                f"pairs: {FEATURES[column]} of the {side} answer of pair {row} (counted from 0) is "
                f"{values[row, column]}, expected a finite number; leave the pair out or look at its answer"
            )


def _strength(found: Estimate) -> str:
    return "strong" if found.value >= STRONG else "moderate" if found.value >= MODERATE else "weak"


def _words(estimate: Estimate, form: str = ".2f") -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
