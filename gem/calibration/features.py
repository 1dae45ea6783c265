"""What a completion says of itself: nine numbers, and the scores that can be read off them without fitting anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gem.config.settings import SCORE_FEATURES
from gem.errors import UserError

# Raw values, in this order along the last axis: entropies and log-probs in nats, the length in tokens.
FEATURES = (
    "final_entropy",
    "fork_entropy",
    "reasoning_entropy",
    "mean_entropy",
    "max_entropy",
    "mean_logprob",
    "sum_logprob",
    "min_logprob",
    "length",
)
DEFAULT_FEATURES = SCORE_FEATURES

PAPER = "paper"
CALIBRATED = "calibrated"
SHORTER, LONGER = "-length", "length"


def feature_array(values: Any, name: str) -> np.ndarray:
    """A tensor or array [..., 9] in the order of `FEATURES`, as float64 on the CPU."""
    array = values.detach().cpu().double().numpy() if hasattr(values, "detach") else np.asarray(values, np.float64)
    if array.ndim < 2 or array.shape[-1] != len(FEATURES):
        raise UserError(
            f"{name}: expected the {len(FEATURES)} features along the last axis, [..., {len(FEATURES)}], "
            f"got {list(array.shape)}; pass all of them, in the order of FEATURES"
        )
    return array


def feature_columns(names: Sequence[str]) -> list[int]:
    """Their places in `FEATURES`; one `UserError` where a name is unknown, given twice, or none is given."""
    unknown = [name for name in names if name not in FEATURES]
    if unknown:
        raise UserError(f"features: {unknown[0]!r} is unknown; choose from {', '.join(FEATURES)}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"features: expected one or more different names, got {list(names)}; name each once")
    return [FEATURES.index(name) for name in names]


def plain_scores(values: np.ndarray, fork_weight: float = 1.0) -> dict[str, np.ndarray]:
    """Scores that need no fit, higher is better: features [..., 9] -> name -> [...].

    Each feature alone, with the sign under which such scores are commonly used; a name is the score's formula:

        -final_entropy, -fork_entropy, -reasoning_entropy, -mean_entropy, -max_entropy       lower entropy is better
        mean_logprob, sum_logprob, min_logprob                                               higher log-prob is better
        -length                                                                              shorter is better
        length                                                                               longer is better
        paper = -final_entropy + fork_weight * fork_entropy                                  GEM, Eq. 1

    Length is there in both directions: it is the confounder that every other score is to be compared with.
    """
    scores = {}
    for i, name in enumerate(FEATURES):
        scores[name if "logprob" in name else f"-{name}"] = values[..., i] if "logprob" in name else -values[..., i]
    scores[LONGER] = values[..., FEATURES.index("length")]
    final, fork = (values[..., FEATURES.index(name)] for name in ("final_entropy", "fork_entropy"))
    scores[PAPER] = -final + fork_weight * fork
    return scores


def linear_score(values: np.ndarray, names: Sequence[str], weights: Sequence[float]) -> np.ndarray:
    """S(a) = sum_f weights_f * x_f(a) for features [..., 9] -> [...]; `Score.linear` gives names and weights."""
    return values[..., feature_columns(names)] @ np.asarray(weights, np.float64)
