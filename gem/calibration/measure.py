"""What a policy makes of given pairs and of its own candidates: features in one forward pass, and the score of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gem.calibration.features import CALIBRATED, FEATURES, feature_columns, linear_score, plain_scores
from gem.calibration.fit import PairCalibration, calibrate, candidate_scales
from gem.calibration.probability import fit_platt
from gem.calibration.samples import evaluate_samples
from gem.calibration.score_file import Platt, Samples, hash_pairs
from gem.calibration.verdict import MIN_PROMPTS, PairFeatures, pair_wins
from gem.config.settings import Sampling, Scoring
from gem.data.answers import answers_match
from gem.data.batches import TokenizedPair
from gem.data.prompts import TextFormat
from gem.errors import UserError
from gem.model.forward import Policy, measured_stats
from gem.progress import Bar
from gem.rollout.sample import Sampler, given_completions, roll_out
from gem.scoring.score import ScoredRollout, rollout_features, score_rollout
from gem.statistics import mean_estimate
from gem_kernels import CompletionFeatures

PromptIds = tuple[int, ...]
# Prompts whose candidates give scales where nothing else is asked of them: with 4 candidates each 96 differences, which
# know a standard deviation to about a tenth.
SCALE_PROMPTS = 16
# Of the pairs' own prompts with a known answer at most so many get candidates to fit to and to measure on: more takes
# longer and tells little more.
MOST_PROMPTS = 64


def pair_features(
    policy: Policy,
    form: TextFormat,
    pairs: Sequence[TokenizedPair],
    scoring: Scoring,
    *,
    batch_size: int,
    bar: Bar | None = None,
) -> PairFeatures:
    """Features of both answers of each pair under the policy, one forward pass in batches of `batch_size` pairs.

    Spans are found as in a rollout. With `no_answer: exclude` pairs with an answer whose span is not found are left
    out, as such a candidate would be. With several processes each runs its share, and all get the whole.

    Raises:
        UserError: there are no pairs, or none is left.
    """
    if not pairs:
        raise UserError("pairs: expected at least one, got none")
    # Pairs of like length together, so that little is padding.
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].prompt_ids), len(pairs[i].chosen_ids)))
    ordered = [pairs[i] for i in order]
    answers = [ids for pair in ordered for ids in (pair.chosen_ids, pair.rejected_ids)]
    rollout = given_completions(form, [pair.prompt_ids for pair in ordered], answers)
    stats = measured_stats(policy, rollout.batch, temperature=scoring.score_temperature, batch_size=batch_size, bar=bar)
    features = rollout_features(rollout, stats.logprobs, stats.entropy, scoring)
    place = np.argsort(order)
    values = feature_table(features).reshape(len(pairs), 2, len(FEATURES))[place]
    kept = features.valid.numpy().reshape(-1, 2).all(1)[place]
    if not kept.any():
        raise UserError(
            "pairs: no pair has a final answer in both of its answers; name how it is found by answer_span, or set "
            "no_answer: tail"
        )
    prompts = [pair.prompt_ids for pair, ok in zip(pairs, kept) if ok]
    return PairFeatures(values[kept, 0], values[kept, 1], prompts)


def feature_table(features: CompletionFeatures) -> np.ndarray:
    """[B, 9] float64, in the order of `FEATURES`."""
    return torch.stack([getattr(features, name) for name in FEATURES], 1).double().numpy()


def prompts_to_sample(pairs: Sequence[TokenizedPair]) -> dict[PromptIds, str | None]:
    """Prompts, each once, with their known answers: at most `MOST_PROMPTS` of those that have one, where these are
    `MIN_PROMPTS` or more; else at most `SCALE_PROMPTS` of all, which are enough for scales."""
    every = known_answers(pairs)
    known = {prompt: answer for prompt, answer in every.items() if answer is not None}
    if len(known) >= MIN_PROMPTS:
        return dict(list(known.items())[:MOST_PROMPTS])
    return dict(list(every.items())[:SCALE_PROMPTS])


def known_answers(pairs: Sequence[TokenizedPair]) -> dict[PromptIds, str | None]:
    """Each prompt once, with its known answer: the first that a row gives."""
    found: dict[PromptIds, str | None] = {}
    for pair in pairs:
        if found.get(pair.prompt_ids) is None:
            found[pair.prompt_ids] = pair.answer
    return found


def own_candidates(
    policy: Policy,
    form: TextFormat,
    prompts: Sequence[PromptIds],
    scoring: Scoring,
    sampling: Sampling,
    *,
    seed: int,
    step: int = 0,
    batch_size: int,
    sampler: Sampler | None = None,
    bar: Bar | None = None,
) -> ScoredRollout:
    """`num_generations` candidates of each prompt, by the policy as it is now, with their features."""
    rollout = roll_out(
        policy, form, prompts, sampling, seed=seed, step=step, batch_size=batch_size,
        stats_temperature=scoring.score_temperature, sampler=sampler, bar=bar,
    )  # fmt: skip
    return score_rollout(policy, rollout, scoring, batch_size=batch_size)


def candidate_features(candidates: ScoredRollout) -> tuple[np.ndarray, np.ndarray]:
    """(features [P, G, 9] float64, which of them are valid [P, G]); outliers that were trimmed are valid here."""
    size = candidates.rollout.batch.num_generations
    valid = candidates.features.valid.numpy().reshape(-1, size)
    return feature_table(candidates.features).reshape(-1, size, len(FEATURES)), valid


def correct_answers(candidates: ScoredRollout, truths: Sequence[str | None]) -> np.ndarray:
    """Which candidates give the known answer of their prompt, [P, G] bool; none where it is not known."""
    size = candidates.rollout.batch.num_generations
    answers = candidates.rollout.spans.answers
    return np.array([
        [truth is not None and answers_match(answer, truth) for answer in answers[i * size : (i + 1) * size]]
        for i, truth in enumerate(truths)
    ])  # fmt: skip


def right_and_wrong(
    candidates: ScoredRollout, prompts: Sequence[PromptIds], truths: Sequence[str | None]
) -> PairFeatures:
    """Every pair of a right and a wrong valid candidate of one prompt, as pairs are given: chosen is the right one."""
    values, valid = candidate_features(candidates)
    correct = correct_answers(candidates, truths)
    chosen, rejected, prompt_of = [np.empty((0, len(FEATURES)))], [np.empty((0, len(FEATURES)))], []
    for prompt, truth, group, ok, right in zip(prompts, truths, values, valid, correct):
        if truth is None:
            continue
        better, worse = group[ok & right], group[ok & ~right]
        chosen.append(np.repeat(better, len(worse), axis=0))
        rejected.append(np.tile(worse, (len(better), 1)))
        prompt_of += [prompt] * (len(better) * len(worse))
    return PairFeatures(np.concatenate(chosen), np.concatenate(rejected), prompt_of)


def calibrate_policy(
    given: PairFeatures,
    candidates: ScoredRollout | None,
    own: PairFeatures | None = None,
    *,
    features: Sequence[str],
    fit_to: str = "auto",
    fork_weight: float = 1.0,
    seed: int = 0,
) -> PairCalibration:
    """The score that tells better from worse for this policy; scales are those of its candidates where there are some.

    Given pairs say which answer is better, but both are written by someone else. Where their right answers are known,
    the policy's own candidates of the same prompts show its own mistakes, which is what a score has to find.

    Args:
        own: `right_and_wrong` of the candidates; None: no answer is known.
        fit_to: "pairs": the given ones. "candidates": `own`. "auto": `own` where it has at least `MIN_PROMPTS` prompts,
            unless the score fitted to the given pairs ranks them better (the 95 % interval of the difference in pair
            accuracy, both held out, lies above 0).

    Raises:
        UserError: fit_to is "candidates", and fewer than 2 prompts have right and wrong candidates; or as `calibrate`.

    Example:
        given = pair_features(policy, form, pairs, scoring, batch_size=8)
        pool = own_candidates(policy, form, prompts[:16], scoring, sampling, seed=0, batch_size=8)
        fitted = calibrate_policy(given, pool, right_and_wrong(pool, prompts, truths), features=DEFAULT_FEATURES)
    """
    scales = None if candidates is None else candidate_scales(*candidate_features(candidates))

    def fit(pairs: PairFeatures, tested: PairFeatures | None = None) -> PairCalibration:
        return calibrate(
            pairs.chosen, pairs.rejected, pairs.prompts,
            features=features, fork_weight=fork_weight, seed=seed, scales=scales, given=tested,
        )  # fmt: skip

    number = 0 if own is None else len(set(own.prompts))
    if fit_to == "candidates":
        if own is None or number < 2:
            raise UserError(
                f"calibrate_on: {number} prompts with a known answer have both a right and a wrong candidate, "
                "expected at least 2; sample more candidates of each, or set calibrate_on: pairs"
            )
        return fit(own, given)
    of_pairs = fit(given)
    if fit_to == "pairs" or own is None or number < MIN_PROMPTS:
        return of_pairs
    of_own = fit(own, given)
    margins = ((own.chosen - own.rejected)[:, feature_columns(features)] * of_pairs.unseen_weights(own.prompts)).sum(1)
    gain = mean_estimate(pair_wins(margins) - pair_wins(of_own.held_out), own.prompts, seed)
    return of_pairs if gain.low > 0 else of_own


def candidate_scores(fitted: PairCalibration, prompts: Sequence[PromptIds], candidates: ScoredRollout) -> np.ndarray:
    """The calibrated score of each candidate, [P, G]; of a prompt it was fitted on, by the score fitted without it."""
    values, _ = candidate_features(candidates)
    weights = fitted.unseen_weights(prompts)
    return np.stack([linear_score(group, fitted.features, own) for group, own in zip(values, weights)])


def measure_samples(
    scores: np.ndarray,
    candidates: ScoredRollout,
    truths: Sequence[str | None],
    *,
    fork_weight: float = 1.0,
    seed: int = 0,
) -> tuple[Samples | None, Platt | None]:
    """What scores [P, G] are worth on candidates of prompts whose answer is known; (None, None) where none is."""
    known = [i for i, truth in enumerate(truths) if truth is not None]
    if not known:
        return None, None
    values, valid = candidate_features(candidates)
    size = values.shape[1]
    answers = [candidates.rollout.spans.answers[i * size : (i + 1) * size] for i in known]
    correct = correct_answers(candidates, truths)[known]
    every = plain_scores(values[known], fork_weight) | {CALIBRATED: scores[known]}
    samples = evaluate_samples(every, correct, answers, valid[known], seed=seed)
    return samples, fit_platt(scores[known], correct, valid[known])


def pairs_hash(pairs: Sequence[TokenizedPair]) -> str:
    """Of the pairs as tokens: what the model sees of them."""
    return hash_pairs([list(p.prompt_ids), list(p.chosen_ids), list(p.rejected_ids)] for p in pairs)
