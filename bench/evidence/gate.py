"""How often a verdict lets a score pass that knows nothing of the model's own answers, and one that does. One command:

    python -m bench.evidence.gate

Draws of 48 of the 128 held-out problems with their samples from the results of `bench.evidence` stand in for the given
prompts and the candidates of a run. "nothing": right and wrong are exchanged at random within each prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gem.calibration.features import DEFAULT_FEATURES, FEATURES
from gem.calibration.fit import PairCalibration, calibrate, candidate_scales
from gem.calibration.verdict import MIN_PROMPTS, PairFeatures, pair_accuracy

RESULTS = Path(__file__).parents[1] / "results" / "evidence"
RULES = ("with the given pairs", "as `gem train` after SFT", "of own answers alone")


@dataclass(frozen=True)
class Seed:
    """What one seed's SFT model said: samples [P, G], given and held-out pairs."""

    features: np.ndarray  # [P, G, 9]; those that the results do not hold are 0
    right: np.ndarray
    valid: np.ndarray
    given: PairFeatures
    held_out: PairFeatures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=150)
    parser.add_argument("--candidates", type=int, default=4)
    given = parser.parse_args(arguments)
    print("| pairs | own answers | draws | " + " | ".join(RULES) + " |\n|---" + "|---" * (2 + len(RULES)) + "|")
    for task in ("arithmetic", "gsm8k_pairs"):
        for known in (False, True):
            found = shares(task, known, given.draws, given.candidates)
            words = "as they are" if known else "know nothing"
            print(f"| {task} | {words} | {len(found)} | " + " | ".join(f"{x:.2f}" for x in found.mean(0)) + " |")


def shares(task: str, known: bool, draws: int, candidates: int, prompts: int = 48) -> np.ndarray:
    """[draws that have own answers to fit to, rules]: is the verdict `informative`?"""
    seeds = [load(seed, task) for seed in range(3)]
    draw, found = np.random.default_rng(0), []
    for number in range(draws):
        seed = seeds[number % len(seeds)]
        rows = draw.permutation(len(seed.right))[: min(prompts, len(seed.given.prompts))]
        features, right, valid = (x[rows, :candidates].copy() for x in (seed.features, seed.right, seed.valid))
        if not known:
            for mine, ok in zip(right, valid):
                mine[ok] = draw.permutation(mine[ok])
        own = own_pairs(features, right, valid, seed.given.prompts)
        if len(set(own.prompts)) < MIN_PROMPTS:
            continue
        fitted = calibrate(
            own.chosen, own.rejected, own.prompts,
            features=DEFAULT_FEATURES, scales=candidate_scales(features, valid), given=seed.given,
        )  # fmt: skip
        found.append(passes(fitted, seed.held_out))
    return np.array(found, float)


def passes(fitted: PairCalibration, held_out: PairFeatures) -> tuple[bool, bool, bool]:
    """By each of `RULES`."""
    assert fitted.own is not None
    return (
        fitted.verdict.kind == "informative",
        fitted.verdict_after_sft(held_out).kind == "informative",
        pair_accuracy(fitted.held_out, fitted.own.prompts).low > 0.5,
    )


def load(seed: int, task: str) -> Seed:
    """The samples are arithmetic's for both tasks; the pairs are the task's."""
    samples, pairs = (json.loads((RESULTS / t / f"seed-{seed}/scores.json").read_text()) for t in ("arithmetic", task))
    return Seed(
        table(samples["samples"]),
        np.array(samples["right"]) > 0.5,
        np.array(samples["valid"]),
        margins(pairs["given"], [f"given {prompt}" for prompt in pairs["given_prompts"]]),
        margins(pairs["held_out"], [f"held out {i}" for i in range(len(pairs["held_out"]["paper"]))]),
    )


def table(scores: dict[str, Any]) -> np.ndarray:
    """Scores of single features, under their names with their signs -> [..., 9]."""
    shape = np.array(scores["paper"]).shape
    found = np.zeros((*shape, len(FEATURES)))
    for place, name in enumerate(FEATURES):
        if name in scores:
            found[..., place] = scores[name]
        elif f"-{name}" in scores:
            found[..., place] = -np.array(scores[f"-{name}"])
    return found


def margins(scores: dict[str, Any], prompts: list[str]) -> PairFeatures:
    """A pair's difference stands for its chosen answer, beside zeros."""
    chosen = table(scores)
    return PairFeatures(chosen, np.zeros_like(chosen), list(prompts))


def own_pairs(features: np.ndarray, right: np.ndarray, valid: np.ndarray, prompts: Sequence[Any]) -> PairFeatures:
    """Every right sample with every wrong one of its prompt."""
    better, worse, names = [], [], []
    for values, good, ok, prompt in zip(features, right, valid, prompts):
        for one in values[good & ok]:
            for other in values[~good & ok]:
                better.append(one)
                worse.append(other)
                names.append(prompt)
    return PairFeatures(np.array(better).reshape(-1, len(FEATURES)), np.array(worse).reshape(-1, len(FEATURES)), names)


if __name__ == "__main__":
    main()
