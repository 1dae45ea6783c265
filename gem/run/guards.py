"""Guards: a reward that a model makes of its own entropy gets hacked, and these numbers show it.

Each looks at one number of a step's metrics (or of an evaluation's) and breaches when it passes its limit:

    kl               KL from the starting policy, nats a token, above guard_kl
    length           mean completion length above guard_length_ratio times that at the start, or below its inverse
    repetition       share of fork tokens that repeat what stood before, above guard_repetition
    span_rate        share of completions with an answer, below guard_span_rate times that at the start
    h_final          mean H_final, nats, below guard_h_final
    preference       held-out preference accuracy more than guard_preference_drop below its best
    score            held-out pair accuracy of the score more than guard_score_drop below its best

The start is the first step that is checked. `watch` does on a breach what the setting `guards` says: warn, lower
lambda, go back to the best weights, or stop the stage. A number that is missing or NaN breaches nothing: a step that is
not finite is the trainer's matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem.checkpoint import states
from gem.config.settings import GuardSettings
from gem.evaluation.evaluate import Evaluation
from gem.evaluation.report import evaluation_metrics
from gem.parallel import processes
from gem.run.session import RunState
from gem.run.stages import Stage


@dataclass(frozen=True)
class Breach:
    """A guard whose number passed its limit."""

    guard: str
    value: float
    limit: float
    message: str


@dataclass(frozen=True)
class Baseline:
    """What the numbers are compared with: the first step's, and the best accuracies so far. None: not seen yet."""

    mean_length: float | None = None
    span_rate: float | None = None
    best_preference: float | None = None
    best_score: float | None = None


class Guards:
    """The guards of a run: `check` each step's metrics and each evaluation's, act on what it returns as `action` says.

    action: "off", "warn", "lower_fork_weight" (to `lowered(fork_weight)`), "rollback" (to the best weights) or "stop".
    """

    def __init__(self, settings: GuardSettings, baseline: Baseline | None = None) -> None:
        self.settings = settings
        self.baseline = baseline or Baseline()

    @property
    def action(self) -> str:
        return self.settings.guards

    def check(self, metrics: Mapping[str, Any]) -> list[Breach]:
        """The guards that these metrics breach; none where guards are off."""
        if self.action == "off":
            return []
        found = breaches(metrics, self.baseline, self.settings)
        self.baseline = next_baseline(metrics, self.baseline)
        return found

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.baseline)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.baseline = Baseline(**state)


def breaches(metrics: Mapping[str, Any], baseline: Baseline, limits: GuardSettings) -> list[Breach]:
    """Every guard whose number is in `metrics` and beyond its limit, in the order of this file's table."""
    found: list[Breach] = []

    def look(guard: str, key: str, message: str, *, most: float = math.inf, least: float = -math.inf) -> None:
        value = _number(metrics, key)
        if value is not None and not least <= value <= most:
            limit = most if value > most else least
            found.append(Breach(guard, value, limit, f"{message} is {value:.4g}, limit {limit:.4g}"))

    look("kl", "kl", "KL from the starting policy (nats a token)", most=limits.guard_kl)
    if baseline.mean_length is not None:
        length, ratio = baseline.mean_length, limits.guard_length_ratio
        words = "mean completion length (tokens)"
        look("length", "completions/mean_length", words, most=length * ratio, least=length / ratio)
    look("repetition", "gem/fork_repetition", "share of fork tokens that repeat", most=limits.guard_repetition)
    if baseline.span_rate is not None:
        look(
            "span_rate", "gem/answer_span_found", "share of completions with an answer",
            least=baseline.span_rate * limits.guard_span_rate,
        )  # fmt: skip
    look("h_final", "gem/h_final", "H_final (nats)", least=limits.guard_h_final)
    if baseline.best_preference is not None:
        look(
            "preference", "eval/preference_accuracy", "held-out preference accuracy",
            least=baseline.best_preference - limits.guard_preference_drop,
        )  # fmt: skip
    if baseline.best_score is not None:
        look(
            "score", "eval/score_pair_accuracy", "held-out pair accuracy of the score",
            least=baseline.best_score - limits.guard_score_drop,
        )  # fmt: skip
    return found


def next_baseline(metrics: Mapping[str, Any], baseline: Baseline) -> Baseline:
    """The start where it was not known yet, and the best accuracies up to these metrics."""

    def best(before: float | None, key: str) -> float | None:
        return max((value for value in (before, _number(metrics, key)) if value is not None), default=None)

    length, rate = baseline.mean_length, baseline.span_rate
    return Baseline(
        mean_length=_number(metrics, "completions/mean_length") if length is None else length,
        span_rate=_number(metrics, "gem/answer_span_found") if rate is None else rate,
        best_preference=best(baseline.best_preference, "eval/preference_accuracy"),
        best_score=best(baseline.best_score, "eval/score_pair_accuracy"),
    )


def lowered(fork_weight: float) -> float:
    """lambda after a breach: half of it. H_fork is what a policy can raise without end, by rambling.

    A negative lambda rewards no rambling and stays.
    """
    return fork_weight / 2 if fork_weight > 0 else fork_weight


def watch(
    guards: Guards, stage: Stage, state: RunState, row: dict[str, Any], evaluation: Evaluation | None
) -> list[Breach]:
    """Checks a step's metrics and, where there was one, an evaluation's; carries out `guards` on a breach.

    With `guards: rollback` the weights of the best evaluation so far are kept on the disk. What was done is a line of
    the metrics, stage "guard".
    """
    found = guards.check(row)
    if evaluation is not None:
        found += guards.check(evaluation_metrics(evaluation))
        if not found and guards.action == "rollback":
            _keep_best(stage, state, evaluation.preference.accuracy)
    if found:
        _act(guards.action, stage, state, found)
    return found


def _act(action: str, stage: Stage, state: RunState, found: list[Breach]) -> None:
    session, done = stage.session, "warned"
    if action == "lower_fork_weight":
        weight = lowered(stage.scoring.fork_weight)
        stage.scoring = stage.scoring.changed(fork_weight=weight)
        done = f"fork_weight is now {weight:g}"
    elif action == "rollback" and state.best is not None:
        _roll_back(stage, state)
        done = f"back to the weights of {state.best}"
    elif action == "stop":
        state.step = stage.num_steps
        done = f"{stage.name} stopped"
    for breach in found:
        session.console.print(f"Guard {breach.guard}: {breach.message}; {done}", highlight=False)
    guards = [breach.guard for breach in found]
    line = {"stage": "guard", "step": state.step, "guards": guards, "action": action, "done": done}
    session.tracker.write(line, state.total_steps)


def _keep_best(stage: Stage, state: RunState, accuracy: float) -> None:
    """The weights and moments as they are, if no evaluation was better; the ones before go once no checkpoint speaks of
    them."""
    if accuracy < state.best_accuracy:
        return
    session = stage.session
    state.best, state.best_accuracy = f"best-{state.total_steps}", accuracy
    path = session.run_dir / state.best
    parameters, moments = states.trained_parameters(stage.policy.model), stage.trainer.state_dict()
    processes.on_main(lambda: states.save_state(path, parameters, {"trainer": moments}))
    remove_needless(session.run_dir, state)


def remove_needless(run_dir: Path, state: RunState) -> None:
    """Best weights that are neither the best ones nor those of a checkpoint."""
    keep = {str(state.best)}
    processes.on_main(lambda: states.remove_others(run_dir, "best-*", keep | states.needed_directories(run_dir)))


def _roll_back(stage: Stage, state: RunState) -> None:
    """Weights and moments of the best evaluation; the learning rate goes on from where it is."""
    parameters, saved = states.load_checkpoint(stage.session.run_dir / state.best)
    states.restore_parameters(stage.policy.model, parameters)
    num_steps, bad_steps = stage.trainer.num_steps, stage.trainer.bad_steps
    stage.trainer.load_state_dict({**saved["trainer"], "num_steps": num_steps, "bad_steps": bad_steps})


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return None if value is None or math.isnan(value) else float(value)
