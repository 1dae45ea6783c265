"""What a policy makes of given pairs and of its own candidates: features in one forward pass, and the score of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gem.calibration.features import CALIBRATED, FEATURES, linear_score, plain_scores
from gem.calibration.fit import PairCalibration, calibrate, candidate_scales
from gem.calibration.probability import fit_platt
from gem.calibration.samples import evaluate_samples
from gem.calibration.score_file import Platt, Samples, hash_pairs
from gem.config.settings import Sampling, Scoring
from gem.data.answers import answers_match
from gem.data.batches import TokenizedPair
from gem.data.prompts import TextFormat
from gem.errors import UserError
from gem.model.forward import Policy, measured_stats
from gem.progress import Bar
from gem.rollout.sample import Sampler, given_completions, roll_out
from gem.scoring.score import ScoredRollout, rollout_features, score_rollout
from gem_kernels import CompletionFeatures

PromptIds = tuple[int, ...]
# Prompts whose candidates give scales where nothing else is asked of them: with 4 candidates each 96 differences, which
# know a standard deviation to about a tenth.
SCALE_PROMPTS = 16


@dataclass(frozen=True)
class PairFeatures:
    """Features of given pairs [N, 9] float64, in the order of `FEATURES`, and the prompt of each."""

    chosen: np.ndarray
    rejected: np.ndarray
    prompts: list[PromptIds]


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


def calibrate_policy(
    given: PairFeatures,
    candidates: ScoredRollout | None,
    *,
    features: Sequence[str],
    fork_weight: float = 1.0,
    seed: int = 0,
) -> PairCalibration:
    """The score fitted to pairs, with the scales of the policy's own candidates where there are some.

    Example:
        given = pair_features(policy, form, pairs, scoring, batch_size=8)
        pool = own_candidates(policy, form, prompts[:16], scoring, sampling, seed=0, batch_size=8)
        fitted = calibrate_policy(given, pool, features=DEFAULT_FEATURES)
    """
    scales = None if candidates is None else candidate_scales(*candidate_features(candidates))
    return calibrate(
        given.chosen,
        given.rejected,
        given.prompts,
        features=features,
        fork_weight=fork_weight,
        seed=seed,
        scales=scales,
    )


def candidate_scores(
    fitted: PairCalibration, given: PairFeatures, prompts: Sequence[PromptIds], candidates: ScoredRollout
) -> np.ndarray:
    """The calibrated score of each candidate, [P, G]; of a prompt with pairs, by the score fitted without these."""
    values, _ = candidate_features(candidates)
    names, weights = fitted.linear
    row_of = {prompt: row for row, prompt in enumerate(given.prompts)}
    return np.stack([
        linear_score(group, names, fitted.held_out_weights[row_of[prompt]] if prompt in row_of else weights)
        for prompt, group in zip(prompts, values)
    ])  # fmt: skip


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
    correct = np.array([[answers_match(a, truths[i]) for a in row] for i, row in zip(known, answers)])
    every = plain_scores(values[known], fork_weight) | {CALIBRATED: scores[known]}
    samples = evaluate_samples(every, correct, answers, valid[known], seed=seed)
    return samples, fit_platt(scores[known], correct, valid[known])


def pairs_hash(pairs: Sequence[TokenizedPair]) -> str:
    """Of the pairs as tokens: what the model sees of them."""
    return hash_pairs([list(p.prompt_ids), list(p.chosen_ids), list(p.rejected_ids)] for p in pairs)
