"""Evaluations as rows of metrics and as a table."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gem.evaluation.evaluate import AnswerAccuracy, Evaluation, PreferenceAccuracy
from gem.statistics import Estimate

WIDTH = len("[0.000, 0.000]") + 1  # of a column's heading, in as many lines as it takes
MEANS = {
    "mean score S": "score",
    "H_final (nats)": "h_final",
    "H_fork (nats)": "h_fork",
    "pairs decided": "pairs_decided",
    "answer span found": "answer_span_found",
    "tokens per completion": "mean_length",
}


def evaluation_metrics(result: Evaluation) -> dict[str, Any]:
    """One flat row: eval/preference_*, eval/answer_*, eval/gem/* and so on; what was not measured is left out."""
    row: dict[str, Any] = {f"eval/preference_{k}": v for k, v in dataclasses.asdict(result.preference).items()}
    row |= {f"eval/preference_accuracy_{kind}": value.accuracy for kind, value in result.preferences.items()}
    row |= _estimates({"calibration_error": result.calibration.error, "brier": result.calibration.brier})
    if result.score:
        row |= _estimates({"score_pair_accuracy": result.score})
    if result.answers:
        row |= {f"eval/answer_{key}": value for key, value in dataclasses.asdict(result.answers).items()}
    if result.candidates:
        row |= {f"eval/gem/{key}": value for key, value in dataclasses.asdict(result.candidates).items()}
    if result.sampled:
        names = {"accuracy": "sampled_accuracy", "majority": "majority_accuracy", "best_score": "best_score_accuracy"}
        estimates = {field.name: getattr(result.sampled, field.name) for field in dataclasses.fields(result.sampled)}
        row |= _estimates({names.get(name, f"score_{name}"): value for name, value in estimates.items()})
    return {**{key: value for key, value in row.items() if value is not None}, "eval/seconds": result.seconds}


def _estimates(values: dict[str, Estimate | None]) -> dict[str, float]:
    row = {}
    for name, value in values.items():
        if value is not None:
            row |= {f"eval/{name}": value.value, f"eval/{name}_low": value.low, f"eval/{name}_high": value.high}
    return row


def evaluation_table(evaluations: dict[str, Evaluation]) -> Table:
    """Accuracies, calibration and the score's worth with 95 % intervals, and the candidates' means, by stage.

    Of three stages it fits 80 columns. Where the score is fitted in the run, "mean score S" has the fitted one alone:
    the one before it has another scale.
    """
    stages = list(evaluations.values())
    fitted = {e.score_is_fitted for e in stages if e.candidates}
    note = "; before one is calibrated the score is the published one" if len(fitted) > 1 else ""
    table = Table(
        title=f"Held out (how many), [95 % interval]{note}", title_justify="left", box=SIMPLE_HEAD, show_edge=False,
        pad_edge=False,
    )  # fmt: skip
    table.add_column("", overflow="fold")
    for stage in evaluations:
        name = stage if stage in ("start", "value") else f"after {stage}"
        table.add_column("\n".join(textwrap.wrap(name, WIDTH)), justify="right", overflow="fold")

    def add(name: str, of: Callable[[Evaluation], Estimate | None], *, interval: bool = True) -> None:
        """A row of what was measured, with how many it is of; none where no stage has it."""
        values = [of(evaluation) for evaluation in stages]
        if not (number := next((value.count for value in values if value), 0)):
            return
        table.add_row(f"{name} ({number})" if interval else name, *[_number(v and v.value) for v in values])
        if interval:
            table.add_row("", *["-" if v is None else f"[{_number(v.low)}, {_number(v.high)}]" for v in values])

    add("preference accuracy", lambda e: _preference(e.preference))
    for kind, words in (("mean", "  per token"), ("relative", "  relative to the start")):
        if any(e.preferences.get(kind) not in (None, e.preference) for e in stages):
            add(words, lambda e, kind=kind: _preference(e.preferences.get(kind)), interval=False)
    add("score prefers chosen", lambda e: e.score)
    add("calibration error", lambda e: e.calibration.error)
    add("right, greedy", lambda e: _greedy(e.answers))
    add("right, one sample", lambda e: e.sampled and e.sampled.accuracy)
    add("right, best by score", lambda e: e.sampled and e.sampled.best_score)
    add("right, majority", lambda e: e.sampled and e.sampled.majority)
    add("AUROC within a prompt", lambda e: e.sampled and e.sampled.auroc_within)
    add("AUROC over all", lambda e: e.sampled and e.sampled.auroc)
    for words, key in MEANS.items():
        shown = [e.candidates and (key != "score" or len(fitted) < 2 or e.score_is_fitted) for e in stages]
        values = [getattr(e.candidates, key) if there else None for e, there in zip(stages, shown)]
        if any(value is not None for value in values):
            table.add_row(words, *map(_number, values))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _preference(result: PreferenceAccuracy | None) -> Estimate | None:
    return result and Estimate(result.accuracy, result.low, result.high, result.num_pairs)


def _greedy(result: AnswerAccuracy | None) -> Estimate | None:
    return result and Estimate(result.accuracy, result.low, result.high, result.num_problems)
