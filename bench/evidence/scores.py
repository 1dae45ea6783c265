"""What each score knows: of given pairs, of held-out pairs, and of the model's own samples of held-out problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bench.evidence.start import Pool, Start
from gem.calibration.features import CALIBRATED, linear_score, plain_scores
from gem.calibration.fit import PairCalibration
from gem.calibration.measure import (
    PairFeatures,
    calibrate_policy,
    candidate_features,
    own_candidates,
    pair_features,
)
from gem.config.settings import SCORE_FEATURES
from gem.data.answers import answers_match
from gem.data.batches import TokenizedPair
from gem.evaluation.evaluate import reward_differences
from gem.model.forward import pair_logprobs
from gem.rollout.sample import Rollout, roll_out
from gem.scoring.score import ScoredRollout
from gem_kernels import LinearScore

CALIBRATED_ON_PAIRS = "calibrated, scales of pairs"
EVALUATION_SEED = 777  # the held-out samples of every row are drawn with the same random keys


def all_scores(features: np.ndarray, fork_weight: float = 1.0) -> dict[str, np.ndarray]:
    """The scores that need no fit: features [..., 9] -> name -> [...]."""
    scores = plain_scores(features, fork_weight)
    return {"fork_entropy": -scores.pop("-fork_entropy"), **scores}


def calibrated(start: Start, pool: Pool) -> dict[str, tuple[PairFeatures, PairCalibration]]:
    """The score fitted to the given pairs, with the scales of the pool's candidates and with those of the pairs."""
    config = start.config
    given = pair_features(start.policy, start.form, start.data.given, config, batch_size=config.eval_batch_size)
    candidates = pool.scored(start.form, config, None)
    return {
        name: (given, calibrate_policy(given, source, features=SCORE_FEATURES, seed=config.seed))
        for name, source in ((CALIBRATED, candidates), (CALIBRATED_ON_PAIRS, None))
    }


def as_linear(fitted: PairCalibration) -> LinearScore:
    names, weights = fitted.linear
    return LinearScore(dict(zip(names, weights)))


def pair_margins(given: PairFeatures, fits: Mapping[str, PairCalibration], *, held_out: bool) -> dict[str, list[float]]:
    """S(chosen) - S(rejected) of each pair by each score. held_out: the fits have not seen these pairs; otherwise they
    are the pairs of the fits, and each is judged by a fit without its prompt."""
    chosen, rejected = all_scores(given.chosen), all_scores(given.rejected)
    margins = {name: chosen[name] - rejected[name] for name in chosen}
    for name, fitted in fits.items():
        margins[name] = linear_score(given.chosen - given.rejected, *fitted.linear) if held_out else fitted.held_out
    return {name: values.tolist() for name, values in margins.items()}


def sample_scores(candidates: ScoredRollout, fits: Mapping[str, PairCalibration]) -> dict[str, np.ndarray]:
    """Every score of every candidate, name -> [P, G]."""
    values, _ = candidate_features(candidates)
    return all_scores(values) | {name: linear_score(values, *fitted.linear) for name, fitted in fits.items()}


def sft_scores(start: Start, pool: Pool, sizes: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the table of scores, the SFT row) of the SFT model, both from the same held-out samples.

    With `score_samples` 0 nothing is sampled: the table is of pairs alone.
    """
    config, data = start.config, start.data
    found = calibrated(start, pool)
    fits = {name: fitted for name, (_, fitted) in found.items()}
    given = found[CALIBRATED][0]
    held_out = pair_features(
        start.policy, start.form, data.held_out[: sizes["preference_pairs"]], config, batch_size=config.eval_batch_size
    )
    samples = sampled(start, fits, sizes["score_samples"]) if sizes["score_samples"] else {"right": []}
    table = {
        "given": pair_margins(given, fits, held_out=False),
        "given_prompts": [_key(prompt) for prompt in given.prompts],
        "held_out": pair_margins(held_out, fits, held_out=True),
        **samples,
        "verdict": fits[CALIBRATED].verdict.words,
        "weights": {name: dict(zip(fitted.features, fitted.weights.tolist())) for name, fitted in fits.items()},
        "scales": {name: dict(zip(fitted.features, fitted.scales.tolist())) for name, fitted in fits.items()},
    }
    return table, {"right": samples["right"], "won": preferences(start, sizes), "curve": []}


def sampled(start: Start, fits: Mapping[str, PairCalibration], number: int) -> dict[str, Any]:
    """`number` samples of each held-out problem: their scores, which of them count, which are right; [P][number]."""
    config, pairs = start.config, start.data.held_out
    candidates = own_candidates(
        start.policy, start.form, [pair.prompt_ids for pair in pairs], config,
        config.changed(num_generations=number), seed=EVALUATION_SEED, batch_size=config.rollout_batch_size,
    )  # fmt: skip
    known = [i for i, pair in enumerate(pairs) if pair.answer is not None]
    scores = {name: values[known].tolist() for name, values in sample_scores(candidates, fits).items()}
    return {
        "samples": scores,
        "valid": candidate_features(candidates)[1][known].tolist(),
        "right": right_answers(candidates.rollout, pairs),
    }


def base_scores(start: Start, pairs: list[TokenizedPair]) -> dict[str, Any]:
    """The pair table of the model as it came, on pairs of which it has seen none; scales of the pairs."""
    config = start.config
    given = pair_features(start.policy, start.form, pairs, config, batch_size=config.eval_batch_size)
    fitted = calibrate_policy(given, None, features=SCORE_FEATURES, seed=config.seed)
    return {
        "given": pair_margins(given, {CALIBRATED_ON_PAIRS: fitted}, held_out=False),
        "given_prompts": [_key(prompt) for prompt in given.prompts],
        "verdict": fitted.verdict.words,
    }


def measure(start: Start, sizes: dict[str, int]) -> dict[str, Any]:
    """Held-out problems by `samples` answers each, and held-out pairs."""
    config = start.config
    rollout = roll_out(
        start.policy, start.form, [pair.prompt_ids for pair in start.data.held_out],
        config.changed(num_generations=sizes["samples"]), seed=EVALUATION_SEED, batch_size=config.rollout_batch_size,
    )  # fmt: skip
    return {
        "right": right_answers(rollout, start.data.held_out),
        "won": preferences(start, sizes),
        "mean_length": float(rollout.batch.lengths.double().mean()),
        "truncated": float(rollout.truncated.double().mean()),
    }


def right_answers(rollout: Rollout, pairs: list[TokenizedPair]) -> list[list[float]]:
    """[P][G] of the problems whose answer is known: 1 where the candidate ended and gives it."""
    size = rollout.batch.num_generations
    answers = [None if cut else answer for answer, cut in zip(rollout.spans.answers, rollout.truncated.tolist())]
    return [
        [float(answers_match(answer, pair.answer)) for answer in answers[i * size : (i + 1) * size]]
        for i, pair in enumerate(pairs)
        if pair.answer is not None
    ]


def preferences(start: Start, sizes: dict[str, int]) -> list[float]:
    """Of each held-out pair whether the chosen answer is the more probable one, a tie one half."""
    pairs, config = start.data.held_out[: sizes["preference_pairs"]], start.config
    logprobs = pair_logprobs(start.policy, pairs, pad_id=start.form.pad_id, batch_size=config.eval_batch_size)
    difference = reward_differences(logprobs, pairs)[config.preference_reduction]
    return ((torch.sign(difference) + 1) / 2).tolist()


def _key(prompt: tuple[int, ...]) -> str:
    return " ".join(map(str, prompt))
