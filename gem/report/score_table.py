"""A calibrated score on the terminal: its verdict, its accuracies, its weights, its worth on samples."""

from __future__ import annotations

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gem.calibration.features import CALIBRATED, LONGER, PAPER, SHORTER
from gem.calibration.score_file import Samples, Score
from gem.statistics import Estimate

_NAMES = {
    PAPER: "paper's score",
    CALIBRATED: "calibrated, held out",
    SHORTER: "-length (shorter is better)",
    LONGER: "length (longer is better)",
}


def score_report(score: Score) -> Group:
    """All of it, the verdict last."""
    parts = [accuracy_table(score), weight_table(score)]
    if score.samples:
        parts += [sample_table(score.samples), choice_table(score.samples)]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts), Text(score.verdict.words))


def accuracy_table(score: Score) -> Table:
    """Pair accuracy of every score, the best first."""
    pairs, prompts = score.num_pairs, score.num_prompts
    counts = f"{pairs} pairs" if pairs == prompts else f"{pairs} pairs of {prompts} prompts"
    table = _table(f"Which answer is better ({counts}; chance 0.5)", "score", "pair accuracy", "95 % interval")
    for name, value in sorted(score.pair_accuracy.items(), key=lambda item: -item[1].value):
        style = "bold" if name == CALIBRATED else ""
        table.add_row(_name(name), f"{value.value:.3f}", _interval(value), style=style)
    return table


def weight_table(score: Score) -> Table:
    """Weights of the standardised features. A positive weight: more of it is better."""
    table = _table(
        f"The calibrated score (fitted to {score.fitted_to}, l2 {score.l2:g}, scales from {score.scales_from})",
        "feature",
        "weight",
        "95 % interval",
        "scale",
    )
    for name in score.features:
        low, high = score.weight_intervals[name]
        table.add_row(name, f"{score.weights[name]:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{score.scales[name]:.4g}")
    return table


def sample_table(samples: Samples) -> Table:
    """What every score knows of the model's own samples, the best first."""
    size = f"{samples.num_prompts} prompts x {samples.num_generations}"
    table = _table(
        f"The model's own samples ({size}; 95 % intervals)",
        *("score", "AUROC within a prompt", "over all", f"best of {samples.num_generations}", "best - single"),
    )
    within = {name: value.value for name, value in samples.auroc_within.items()}
    for name in sorted(samples.best_of, key=lambda name: -within.get(name, samples.best_of[name].value)):
        table.add_row(
            Text(name) if name == CALIBRATED else _name(name),
            _both(samples.auroc_within.get(name)),
            _both(samples.auroc_over.get(name)),
            _both(samples.best_of[name]),
            _both(samples.difference.get(name), "+.3f"),
            style="bold" if name == CALIBRATED else "",
        )
    return table


def choice_table(samples: Samples) -> Table:
    """Share right by how the answer is chosen among a prompt's samples."""
    table = _table("Share right", "answer chosen", "share", "95 % interval")
    rows = {"one sample": samples.single, "majority": samples.majority}
    if CALIBRATED in samples.best_of:
        if CALIBRATED in samples.weighted_majority:
            rows["majority weighted by the calibrated score"] = samples.weighted_majority[CALIBRATED]
        rows["best by the calibrated score"] = samples.best_of[CALIBRATED]
    rows["any of them right"] = samples.any
    for name, value in rows.items():
        table.add_row(name, f"{value.value:.3f}", _interval(value))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _name(name: str) -> Text:
    """As text: rich reads brackets as markup."""
    return Text(_NAMES.get(name, name))


def _interval(value: Estimate, form: str = ".3f") -> str:
    return f"[{value.low:{form}}, {value.high:{form}}]"


def _both(value: Estimate | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value.value:{form}} {_interval(value, form)}"
