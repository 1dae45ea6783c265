"""Evaluations as rows of metrics and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from gem.evaluation.evaluate import AnswerAccuracy, Evaluation, PreferenceAccuracy
from gem.statistics import Estimate


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
    """Accuracies, calibration and the score's worth with 95 % intervals, and the candidates' means, by stage."""
    stages = list(evaluations.values())
    table = Table(title="Held out (how many)", title_justify="left")
    table.add_column("", no_wrap=True)
    for stage in evaluations:
        name = stage if stage in ("start", "value") else f"after {stage}"
        table.add_column(name, justify="right", no_wrap=True)

    def with_interval(name: str, values: list[tuple[float, float, float] | None]) -> None:
        table.add_row(name, *["-" if v is None else f"{v[0]:.3f}" for v in values])
        table.add_row("  95 % interval", *["-" if v is None else f"[{v[1]:.3f}, {v[2]:.3f}]" for v in values])

    def share(result: PreferenceAccuracy | AnswerAccuracy | None) -> tuple[float, float, float] | None:
        return None if result is None else (result.accuracy, result.low, result.high)

    def estimate(value: Estimate | None) -> tuple[float, float, float] | None:
        return None if value is None else (value.value, value.low, value.high)

    with_interval(f"preference accuracy ({stages[0].preference.num_pairs})", [share(e.preference) for e in stages])
    for kind, words in (("mean", "  per token"), ("relative", "  relative to the start")):
        values = [e.preferences.get(kind) for e in stages]
        if any(values) and not all(value == e.preference for value, e in zip(values, stages)):
            table.add_row(words, *["-" if v is None else f"{v.accuracy:.3f}" for v in values])
    with_interval("calibration error", [estimate(e.calibration.error) for e in stages])
    if any(e.answers for e in stages):
        number = next(e.answers.num_problems for e in stages if e.answers)
        with_interval(f"answer accuracy ({number})", [share(e.answers) for e in stages])
    if any(e.sampled for e in stages):
        number = next(e.sampled.majority.count for e in stages if e.sampled)
        with_interval(f"  majority vote ({number})", [estimate(e.sampled and e.sampled.majority) for e in stages])
        with_interval("AUROC of the score", [estimate(e.sampled and e.sampled.auroc) for e in stages])
    for name, key in (
        ("mean score S", "score"), ("H_final (nats)", "h_final"), ("H_fork (nats)", "h_fork"),
        ("pairs decided", "pairs_decided"), ("answer span found", "answer_span_found"),
        ("tokens per completion", "mean_length"),
    ):  # fmt: skip
        values = [getattr(e.candidates, key) if e.candidates else None for e in stages]
        table.add_row(name, *["-" if value is None else f"{value:.3f}" for value in values])
    return table
