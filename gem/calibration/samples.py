"""What scores are worth on the model's own samples, where it is known which are right: best of G against one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gem.calibration.features import CALIBRATED
from gem.calibration.probability import preference_probabilities, reliability
from gem.calibration.score_file import Roc, Samples
from gem.data.answers import normalize_answer
from gem.errors import UserError
from gem.statistics import auroc_estimates, majority_answer, mean_estimate, share_estimate

Answers = Sequence[Sequence[str | None]]


def evaluate_samples(
    scores: Mapping[str, Any],
    correct: Any,
    answers: Answers,
    valid: Any,
    *,
    main: str = CALIBRATED,
    seed: int = 0,
) -> Samples:
    """Measures of scores [P, G] of G samples of each of P prompts, each with a 95 % interval over prompts.

        single              share of all samples that is right
        any                 share of prompts with a right sample
        majority            share of prompts whose most frequent answer is right
        best_of             share of prompts whose valid sample of the highest score is right, ties by their mean
        weighted_majority   share of prompts whose answer of the largest sum of e^S over valid samples is right: for
                            log-probs the weighted vote of Wang et al. 2022 (arXiv 2203.11171)
        difference          best_of - single, paired by prompt
        auroc_within, _over P(a right sample scores higher than a wrong one), of the same prompt, or of any two
        roc_within          of `main`: the curve whose area is auroc_within
        reliability         of `main`: predicted probability against share right (`gem.calibration.probability`)

    Equal answers, after normalisation, are right or wrong together. A prompt without a valid sample counts as wrong
    for best_of and weighted_majority. A score without both right and wrong samples has no AUROC and is left out there.

    Args:
        scores: name -> [P, G], higher is better; finite where valid.
        correct, valid: [P, G] bool. answers: [P][G], None where none was found.
        main: the score that roc_within and reliability are of.

    Raises:
        UserError: shapes that do not agree, no samples, an unknown `main`, a score that is not finite.

    Example:
        found = evaluate_samples({"calibrated": s, "mean_logprob": m}, correct, answers, valid)
        found.best_of["calibrated"].value, found.difference["calibrated"].low
    """
    right, kept = _array(correct, bool), _array(valid, bool)
    values = {name: _array(value, np.float64) for name, value in scores.items()}
    _check(values, right, kept, answers, main)
    prompts = range(len(right))
    single = right.mean(1)
    best = {name: _best_of(value, right, kept) for name, value in values.items()}
    voted = np.array([_majority(row, ok) for row, ok in zip(answers, right)])
    weighted = {name: _weighted_majority(value, right, answers, kept) for name, value in values.items()}
    tensors = torch.from_numpy(right), torch.from_numpy(kept)
    aurocs = {name: auroc_estimates(torch.from_numpy(value), *tensors, seed) for name, value in values.items()}

    def share(wins: np.ndarray) -> Any:
        return share_estimate(torch.from_numpy(wins.astype(np.float64)), prompts, seed)

    return Samples(
        auroc_within={name: within for name, (_, within) in aurocs.items() if within is not None},
        auroc_over={name: over for name, (over, _) in aurocs.items() if over is not None},
        best_of={name: share(wins) for name, wins in best.items()},
        difference={name: mean_estimate(torch.from_numpy(w - single), prompts, seed) for name, w in best.items()},
        single=share_estimate(torch.from_numpy(right.ravel()), np.repeat(prompts, right.shape[1]).tolist(), seed),
        majority=share(voted),
        any=share(right.any(1)),
        weighted_majority={name: share(wins) for name, wins in weighted.items()},
        num_prompts=right.shape[0],
        num_generations=right.shape[1],
        roc_within=roc_within(values[main], right, kept),
        reliability=reliability(values[main], right, kept),
    )


def roc_within(scores: np.ndarray, correct: np.ndarray, valid: np.ndarray) -> Roc:
    """ROC curve within prompts [P, G]: the mean, at each share of wrong samples, of the prompts' own curves.

    A prompt weighs as its number of pairs of a right and a wrong sample, so the area under the curve (trapezoids: ties
    one half) is `auroc_within`. Where the curve jumps a share of wrong samples stands there twice. Both lists are
    empty where no prompt has both right and wrong samples.
    """
    curves, weights = [], []
    for values, right, kept in zip(scores, correct, valid):
        positive, negative = values[kept & right], values[kept & ~right]
        if len(positive) and len(negative):
            thresholds = np.unique(values[kept])[::-1]
            hits = [(values_[None] >= thresholds[:, None]).mean(1) for values_ in (negative, positive)]
            curves.append([np.concatenate([[0.0], share]) for share in hits])
            weights.append(len(positive) * len(negative))
    if not curves:
        return Roc(false_positive=[], true_positive=[])
    places = np.unique(np.concatenate([false for false, _ in curves]))
    sides = np.zeros((2, len(places)))
    for (false, true), weight in zip(curves, weights):
        sides += weight / sum(weights) * _both_sides(false, true, places)
    return Roc(false_positive=np.repeat(places, 2).tolist(), true_positive=np.clip(sides.T.ravel(), 0.0, 1.0).tolist())


def _both_sides(false: np.ndarray, true: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A polyline's value just before and just after each place, [2, places]; they differ where it rises upright."""
    steps, first = np.unique(false, return_index=True)
    last = np.append(first[1:], len(false)) - 1
    after = np.searchsorted(steps, places)
    at = steps[after] == places
    before = np.maximum(after - 1, 0)
    width = np.where(at, 1.0, steps[after] - steps[before])
    between = true[last[before]] + (places - steps[before]) / width * (true[first[after]] - true[last[before]])
    return np.stack([np.where(at, true[first[after]], between), np.where(at, true[last[after]], between)])


def _best_of(scores: np.ndarray, correct: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[P]: is the valid sample of the highest score right, ties by their mean; 0 without a valid one."""
    shown = np.where(valid, scores, -np.inf)
    top = (shown == shown.max(1, keepdims=True)) & valid
    return (top & correct).sum(1) / np.maximum(top.sum(1), 1)


def _majority(answers: Sequence[str | None], correct: np.ndarray) -> bool:
    chosen = majority_answer(answers)
    return chosen is not None and bool(correct[list(answers).index(chosen)])


def _weighted_majority(scores: np.ndarray, correct: np.ndarray, answers: Answers, valid: np.ndarray) -> np.ndarray:
    """[P]: is the answer of the largest sum of e^S right; of equals the one given first; 0 without any."""
    votes = preference_probabilities(scores, valid)
    wins = np.zeros(len(scores), bool)
    for p, row in enumerate(answers):
        sums: dict[str, float] = {}
        place: dict[str, int] = {}
        for i, answer in enumerate(row):
            if answer is not None and valid[p, i]:
                key = normalize_answer(answer)
                sums[key] = sums.get(key, 0.0) + votes[p, i]
                place.setdefault(key, i)
        if sums:
            wins[p] = correct[p, place[max(sums, key=sums.__getitem__)]]
    return wins


def _array(values: Any, kind: type) -> np.ndarray:
    array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    return array.astype(kind)


def _check(
    scores: Mapping[str, np.ndarray], correct: np.ndarray, valid: np.ndarray, answers: Answers, main: str
) -> None:
    shape = correct.shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"samples: expected correct as [P, G] with at least one sample, got {list(shape)}")
    sizes = {"valid": valid.shape} | {f"score {name!r}": value.shape for name, value in scores.items()}
    lengths = {len(row) for row in answers}
    sizes["answers"] = (len(answers), *lengths)
    for name, size in sizes.items():
        if size != shape:
            raise UserError(f"samples: expected {name} as [P, G] = {list(shape)}, as correct has it, got {list(size)}")
    if main not in scores:
        raise UserError(f"samples: main is {main!r}, expected one of the scores: {', '.join(scores) or 'none given'}")
    for name, value in scores.items():
        bad = np.argwhere(valid & ~np.isfinite(value))
        if len(bad):
            p, i = bad[0].tolist()
            raise UserError(
                f"samples: score {name!r} of sample {i} of prompt {p} (counted from 0) is {value[p, i]}, expected a "
                "finite number; mark the sample as not valid"
            )
