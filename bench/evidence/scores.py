"""What each score knows: of given pairs, of held-out pairs, and of the model's own samples of held-out problems."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.evidence.start import Start
from gem.calibration.features import CALIBRATED, feature_columns, linear_score, plain_scores
from gem.calibration.fit import PairCalibration
from gem.calibration.measure import (
    calibrate_policy,
    candidate_features,
    own_candidates,
    pair_features,
    right_and_wrong,
)
from gem.calibration.verdict import PairFeatures
from gem.config.settings import SCORE_FEATURES
from gem.data.answers import answers_match
from gem.data.batches import TokenizedPair
from gem.evaluation.evaluate import reward_differences
from gem.model.forward import pair_logprobs
from gem.rollout.sample import Rollout, roll_out
from gem_kernels import LinearScore

CALIBRATED_ON_PAIRS = "calibrated on pairs"
EVALUATION_SEED = 777  # the held-out samples of every row are drawn with the same random keys


def all_scores(features: np.ndarray, fork_weight: float = 1.0) -> dict[str, np.ndarray]:
    """The scores that need no fit: features [..., 9] -> name -> [...]."""
    scores = plain_scores(features, fork_weight)
    return {"fork_entropy": -scores.pop("-fork_entropy"), **scores}


def calibrated(start: Start) -> tuple[PairFeatures, dict[str, PairCalibration]]:
    """(features of the given pairs, the score fitted as `gem train` fits it, and to the given pairs alone).

    The candidates of the given prompts give the scales of both.
    """
    config, own = start.config, start.own
    assert own is not None
    given = pair_features(start.policy, start.form, start.data.given, config, batch_size=config.eval_batch_size)
    candidates = own.scored(start.form, config, None)
    pairs = right_and_wrong(candidates, [pair.prompt_ids for pair in own.pairs], [pair.answer for pair in own.pairs])

    def fit(fit_to: str) -> PairCalibration:
        return calibrate_policy(given, candidates, pairs, features=SCORE_FEATURES, fit_to=fit_to, seed=config.seed)

    return given, {CALIBRATED: fit("auto"), CALIBRATED_ON_PAIRS: fit("pairs")}


def as_linear(fitted: PairCalibration) -> LinearScore:
    names, weights = fitted.linear
    return LinearScore(dict(zip(names, weights)))


def pair_margins(given: PairFeatures, fits: Mapping[str, PairCalibration], *, held_out: bool) -> dict[str, list[float]]:
    """S(chosen) - S(rejected) of each pair by each score. held_out: the fits know nothing of these prompts; otherwise
    each pair is judged by a fit without its prompt."""
    chosen, rejected = all_scores(given.chosen), all_scores(given.rejected)
    margins = {name: chosen[name] - rejected[name] for name in chosen}
    differences = given.chosen - given.rejected
    for name, fitted in fits.items():
        unseen = fitted.unseen_weights(given.prompts)
        columns = feature_columns(fitted.features)
        margins[name] = (
            linear_score(differences, *fitted.linear) if held_out else (differences[:, columns] * unseen).sum(1)
        )
    return {name: values.tolist() for name, values in margins.items()}


def sft_scores(start: Start, samples: Path, sizes: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the table of scores, the SFT row) of the SFT model, both from the same held-out samples.

    samples: the file of these, which is made where it is not there. With `score_samples` 0 the table is of pairs alone.
    """
    config, data = start.config, start.data
    given, fits = calibrated(start)
    held_out = pair_features(
        start.policy, start.form, data.held_out[: sizes["preference_pairs"]], config, batch_size=config.eval_batch_size
    )
    found = held_out_samples(start, samples, sizes["score_samples"]) if sizes["score_samples"] else {"right": []}
    if "features" in found:
        values = np.array(found.pop("features"))
        scores = all_scores(values) | {name: linear_score(values, *fitted.linear) for name, fitted in fits.items()}
        found["samples"] = {name: value.tolist() for name, value in scores.items()}
    unseen = pair_margins(held_out, fits, held_out=True)
    verdict = fits[CALIBRATED].verdict_after_sft(held_out, seed=config.seed)  # as in gem train
    table = {
        "given": pair_margins(given, fits, held_out=False),
        "given_prompts": [_key(prompt) for prompt in given.prompts],
        "held_out": unseen,
        **found,
        "verdict": verdict.words,
        "fitted_to": fits[CALIBRATED].fitted_to,
        "weights": {name: dict(zip(fitted.features, fitted.weights.tolist())) for name, fitted in fits.items()},
        "scales": {name: dict(zip(fitted.features, fitted.scales.tolist())) for name, fitted in fits.items()},
    }
    row = {"right": found["right"], "won": preferences(start, sizes), "curve": []}
    if "valid" in found:  # all that ended are valid
        row["truncated"] = 1 - float(np.mean(found["valid"]))
    return table, row


def held_out_samples(start: Start, path: Path, number: int) -> dict[str, Any]:
    """`number` samples of each held-out problem with a known answer: features [P][number][9], which of them count,
    which are right, [P][number]; of the file, or new ones, which are then written there."""
    if not path.is_file():
        config, pairs = start.config, start.data.held_out
        candidates = own_candidates(
            start.policy, start.form, [pair.prompt_ids for pair in pairs], config,
            config.changed(num_generations=number), seed=EVALUATION_SEED, batch_size=config.rollout_batch_size,
        )  # fmt: skip
        known = [i for i, pair in enumerate(pairs) if pair.answer is not None]
        values, valid = candidate_features(candidates)
        found = {
            "features": torch.from_numpy(values[known]),
            "valid": torch.from_numpy(valid[known]),
            "right": torch.tensor(right_answers(candidates.rollout, pairs)),
        }
        part = path.with_name(f".{path.name}.part")
        torch.save(found, part)
        part.rename(path)
    return {name: values.tolist() for name, values in torch.load(path, weights_only=True).items()}


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
