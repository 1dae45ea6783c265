"""Guards: a reward that a model makes of its own entropy gets hacked, and these numbers show it.

Each looks at one number of a step's metrics (or of an evaluation's) and breaches when it passes its limit:

    kl               KL from the starting policy, nats a token, above guard_kl
    length           mean completion length above guard_length_ratio times that at the start, or below its inverse
    repetition       share of fork tokens that repeat what stood before, above guard_repetition
    span_rate        share of completions with an answer, below guard_span_rate times that at the start
    h_final          mean H_final, nats, below guard_h_final
    preference       held-out preference accuracy more than guard_preference_drop below its best

The start is the first step that is checked. What is done on a breach is the configuration's `guards`, and the loop's to
carry out. A number that is missing or NaN breaches nothing: a step that is not finite is the trainer's matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gem.config.settings import TrainConfig


@dataclass(frozen=True)
class Breach:
    """A guard whose number passed its limit."""

    guard: str
    value: float
    limit: float
    message: str


@dataclass(frozen=True)
class Limits:
    """As the settings guard_* say."""

    kl: float = 0.5
    length_ratio: float = 2.0
    repetition: float = 0.5
    span_rate: float = 0.5
    h_final: float = 0.01
    preference_drop: float = 0.1


@dataclass(frozen=True)
class Baseline:
    """What the numbers are compared with: the first step's, and the best accuracy so far. None: not seen yet."""

    mean_length: float | None = None
    span_rate: float | None = None
    best_preference: float | None = None


class Guards:
    """The guards of a run: `check` each step's metrics and each evaluation's, act on what it returns as `action` says.

    action: "off", "warn", "lower_fork_weight" (to `lowered(fork_weight)`), "rollback" (to the best weights) or "stop".
    """

    def __init__(self, config: TrainConfig, baseline: Baseline | None = None) -> None:
        self.action = config.guards
        self.limits = Limits(
            kl=config.guard_kl,
            length_ratio=config.guard_length_ratio,
            repetition=config.guard_repetition,
            span_rate=config.guard_span_rate,
            h_final=config.guard_h_final,
            preference_drop=config.guard_preference_drop,
        )
        self.baseline = baseline or Baseline()

    def check(self, metrics: Mapping[str, Any]) -> list[Breach]:
        """The guards that these metrics breach; none where guards are off."""
        if self.action == "off":
            return []
        found = breaches(metrics, self.baseline, self.limits)
        self.baseline = next_baseline(metrics, self.baseline)
        return found

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.baseline)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.baseline = Baseline(**state)


def breaches(metrics: Mapping[str, Any], baseline: Baseline, limits: Limits) -> list[Breach]:
    """Every guard whose number is in `metrics` and beyond its limit, in the order of this file's table."""
    found: list[Breach] = []

    def look(guard: str, key: str, message: str, *, most: float = math.inf, least: float = -math.inf) -> None:
        value = _number(metrics, key)
        if value is not None and not least <= value <= most:
            limit = most if value > most else least
            found.append(Breach(guard, value, limit, f"{message} is {value:.4g}, limit {limit:.4g}"))

    look("kl", "kl", "KL from the starting policy (nats a token)", most=limits.kl)
    if baseline.mean_length is not None:
        look(
            "length", "completions/mean_length", "mean completion length (tokens)",
            most=baseline.mean_length * limits.length_ratio, least=baseline.mean_length / limits.length_ratio,
        )  # fmt: skip
    look("repetition", "gem/fork_repetition", "share of fork tokens that repeat", most=limits.repetition)
    if baseline.span_rate is not None:
        look(
            "span_rate", "gem/answer_span_found", "share of completions with an answer",
            least=baseline.span_rate * limits.span_rate,
        )  # fmt: skip
    look("h_final", "gem/h_final", "H_final (nats)", least=limits.h_final)
    if baseline.best_preference is not None:
        look(
            "preference", "eval/preference_accuracy", "held-out preference accuracy",
            least=baseline.best_preference - limits.preference_drop,
        )  # fmt: skip
    return found


def next_baseline(metrics: Mapping[str, Any], baseline: Baseline) -> Baseline:
    """The start where it was not known yet, and the best preference accuracy up to these metrics."""
    accuracy, best = _number(metrics, "eval/preference_accuracy"), baseline.best_preference
    if accuracy is not None:
        best = accuracy if best is None else max(best, accuracy)
    length, rate = baseline.mean_length, baseline.span_rate
    return Baseline(
        mean_length=_number(metrics, "completions/mean_length") if length is None else length,
        span_rate=_number(metrics, "gem/answer_span_found") if rate is None else rate,
        best_preference=best,
    )


def lowered(fork_weight: float) -> float:
    """lambda after a breach: half of it. H_fork is what a policy can raise without end, by rambling."""
    return fork_weight / 2


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return None if value is None or math.isnan(value) else float(value)
