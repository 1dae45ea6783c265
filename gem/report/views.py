"""Metrics and calibrated scores -> what the page says of them: charts, tables, the first figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gem.config.plain_yaml import load_yaml
from gem.report import charts
from gem.report.charts import Axis, Lines, Series, number
from gem.report.records import Completion, Source, finite

# (title, unit, {key of metrics.jsonl: name of its line})
CHARTS: list[tuple[str, str, dict[str, str]]] = [
    ("Score of the candidates", "mean, nats", {"gem/score": "score", "reward": "reward"}),
    (
        "Right answers, held out",
        "share, 95 % intervals",
        {
            "eval/sampled_accuracy": "one sample",
            "eval/best_score_accuracy": "best by score",
            "eval/majority_accuracy": "majority",
            "eval/answer_accuracy": "greedy",
        },
    ),
    (
        "Preference accuracy, held out",
        "share of pairs, 95 % interval",
        {"eval/preference_accuracy": "chosen preferred"},
    ),
    (
        "Does the score know right from wrong?",
        "AUROC, 95 % intervals",
        {"eval/score_auroc_within": "within a prompt", "eval/score_auroc": "over all"},
    ),
    ("Entropies", "nats", {"entropy": "all tokens", "gem/h_final": "H_final", "gem/h_fork": "H_fork"}),
    ("KL from the start", "nats a token", {"kl": "KL"}),
    (
        "Length",
        "tokens",
        {"completions/mean_length": "mean", "completions/min_length": "least", "completions/max_length": "most"},
    ),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    ("Learning rate", "", {"learning_rate": "rate"}),
    (
        "Completions",
        "share",
        {
            "gem/answer_span_found": "answer found",
            "completions/clipped_ratio": "cut off",
            "gem/fork_repetition": "forks repeat",
            "gem/valid": "counted",
        },
    ),
    (
        "Groups of candidates",
        "share",
        {"frac_reward_zero_std": "no difference in reward", "gem/pairs_decided": "pairs decided"},
    ),
]
# Rows of the table of evaluations: (words, key without eval/).
EVALUATED = [
    ("preference accuracy", "preference_accuracy"),
    ("per token", "preference_accuracy_mean"),
    ("relative to the start", "preference_accuracy_relative"),
    ("preference margin (nats)", "preference_margin"),
    ("calibration error", "calibration_error"),
    ("Brier score", "brier"),
    ("right: greedy answer", "answer_accuracy"),
    ("right: one sample", "sampled_accuracy"),
    ("right: best by score", "best_score_accuracy"),
    ("right: majority", "majority_accuracy"),
    ("AUROC of the score, within a prompt", "score_auroc_within"),
    ("AUROC of the score, over all", "score_auroc"),
    ("mean score", "gem/score"),
    ("H_final (nats)", "gem/h_final"),
    ("H_fork (nats)", "gem/h_fork"),
    ("pairs of candidates decided", "gem/pairs_decided"),
    ("answer found", "gem/answer_span_found"),
    ("tokens a completion", "gem/mean_length"),
]
# Tiles, the first four that a run has.
HEADLINES = (
    "sampled_accuracy",
    "best_score_accuracy",
    "preference_accuracy",
    "answer_accuracy",
    "score_auroc_within",
)
VERDICTS = {
    "informative": "The score is informative",
    "not_informative": "The score is not informative",
    "explained_by_length": "The score is explained by length",
}


def run_axis(rows: Sequence[dict[str, Any]]) -> Axis:
    """The optimizer steps of a run, its stages and the guards that fired."""
    stages: dict[str, list[int]] = {}
    guards = []
    for row in rows:
        if row["stage"] == "guard":
            guards.append(
                (row["total_steps"], f"guard {', '.join(map(str, row.get('guards') or ['?']))}: {_done(row)}")
            )
        elif row["stage"] not in ("eval", "calibration"):
            stages.setdefault(row["stage"], []).append(row["total_steps"])
    return Axis([(name, steps[0], steps[-1]) for name, steps in stages.items()], guards)


def run_charts(rows: Sequence[dict[str, Any]], axis: Axis) -> tuple[list[Lines], list[Lines]]:
    """(the charts everyone looks at, one of each number that is left)."""
    main, used = [], {"step", "total_steps"}
    for title, unit, names in CHARTS:
        series = [_series(rows, key, name) for key, name in names.items()]
        used |= {k for key in names for k in (key, *_bounds(key))}
        distinct: list[Series] = []
        for one in series:
            if one.points and all(one.points != other.points for other in distinct):
                distinct.append(one)
        if distinct:
            main.append(charts.lines(title, unit, distinct, axis))
    for stage, _, _ in axis.stages:  # a loss of one stage says nothing of another's
        one = _series([row for row in rows if row["stage"] == stage], "loss", "loss")
        if one.points:
            main.append(charts.lines(f"Loss, {stage}", "", [one], axis))
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if finite(value) is not None)
    rest = []
    for key in keys:
        if key not in used and key != "loss" and not key.endswith(("_low", "_high")):
            rest.append(charts.lines(key, "", [_series(rows, key, "value")], axis))
    return main, rest


def evaluation_table(rows: Sequence[dict[str, Any]], axis: Axis) -> dict[str, Any] | None:
    """Before and after each stage: {"columns", "rows": [(words, [(value, interval)], change)], "between": how many}."""
    found = {row.get("after"): row for row in rows if row["stage"] == "eval"}
    names = ["start", *(name for name, _, _ in axis.stages)]
    columns = [name for name in found if name in names] or list(found)
    if not columns:
        return None
    known = dict.fromkeys(key for name in columns for key in found[name] if finite(found[name][key]) is not None)
    listed = [(words, f"eval/{key}") for words, key in EVALUATED if f"eval/{key}" in known]
    table = []
    for words, key in listed:
        points = [_estimate(found[name], key) for name in columns]
        cells = [(number(p[0]), _interval_words(p[1], p[2])) if p else ("–", "") for p in points]
        first, last = points[0], points[-1]
        change = number(last[0] - first[0], signed=True) if len(points) > 1 and first and last else ""
        table.append((words, cells, change))
    counts = {key: value for key, value in found[columns[-1]].items() if key.startswith("eval/") and "num_" in key}
    sizes = [
        f"{value:g} {key.rpartition('num_')[2].replace('_', ' ')}" for key, value in counts.items() if finite(value)
    ]
    heads = [name if name == "start" else f"after {name}" for name in columns]
    return {"columns": heads, "rows": table, "between": len(found) - len(columns), "sizes": ", ".join(sizes)}


def guard_table(rows: Sequence[dict[str, Any]], axis: Axis) -> list[tuple[str, str, str, str]]:
    """(where, which guards, what was to be done, what was)."""
    return [
        (
            axis.words(row["total_steps"]),
            ", ".join(map(str, row.get("guards") or [])),
            str(row.get("action")),
            _done(row),
        )
        for row in rows
        if row["stage"] == "guard"
    ]


def calibration(name: str, score: dict[str, Any]) -> dict[str, Any]:
    """A calibrated score as verdict, facts, tables and drawings; what it lacks is empty."""
    verdict = score.get("verdict") or {}
    samples = score.get("samples") or {}
    bins = [
        (finite(b.get("count")) or 0.0, finite(b.get("confidence")), finite(b.get("share_right")))
        for b in samples.get("reliability") or []
        if isinstance(b, dict)
    ]
    bins = [b for b in bins if b[0] > 0 and None not in b]
    curve = samples.get("roc_within") or {}
    rates = [[finite(x) for x in curve.get(k) or []] for k in ("false_positive", "true_positive")]
    whole = len(rates[0]) == len(rates[1]) > 0 and None not in rates[0] + rates[1]
    kind = str(verdict.get("kind", ""))
    outcomes = {k: samples[k] for k in ("single", "majority", "any") if isinstance(samples.get(k), dict)}
    best = samples.get("best_of") or {}
    words = {"single": "one sample", "majority": "majority vote", "any": "any of them right"}
    answers = {words[k]: v for k, v in outcomes.items()} | {f"best by {k}": v for k, v in best.items()}
    facts = [
        ("model", score.get("model")),
        ("fitted to", score.get("fitted_to")),
        ("pairs", score.get("num_pairs")),
        ("prompts", score.get("num_prompts")),
        ("ridge strength (l2)", number(finite(score.get("l2"))) if finite(score.get("l2")) is not None else None),
        ("intercept", number(finite(score.get("intercept"))) if finite(score.get("intercept")) is not None else None),
        ("hash of the pairs", score.get("pairs_hash")),
    ]
    return {
        "name": name,
        "kind": kind if kind in VERDICTS else "unknown",
        "heading": VERDICTS.get(kind, "Calibrated score"),
        "words": str(verdict.get("words", "")),
        "facts": [(key, str(value)) for key, value in facts if value is not None],
        "pairs": forest(score.get("pair_accuracy") or {}, (0.0, 1.0), 0.5),
        "within": forest(samples.get("auroc_within") or {}, (0.0, 1.0), 0.5),
        "over": forest(samples.get("auroc_over") or {}, (0.0, 1.0), 0.5),
        "answers": forest(answers, (0.0, 1.0), 0.0),
        "weights": _weights(score),
        "roc": charts.roc(*rates) if whole else None,
        "reliability": charts.reliability(bins) if bins else None,
        "bins": [(f"{count:g}", number(confidence), number(right)) for count, confidence, right in bins],
    }


def forest(estimates: dict[str, Any], span: tuple[float, float], mark: float) -> list[dict[str, Any]]:
    """Rows of a table of estimates, the largest first, each with its drawing."""
    rows = []
    for name, given in estimates.items():
        given = given if isinstance(given, dict) else {"value": given}
        value, low, high, count = (finite(given.get(key)) for key in ("value", "low", "high", "count"))
        if value is not None:
            drawing = charts.interval(value, low, high, span, mark)
            row = {
                "name": str(name),
                "value": number(value),
                "interval": _interval_words(low, high),
                "drawing": drawing,
            }
            rows.append((value, {**row, "count": "" if count is None else f"{count:g}"}))
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def headlines(source: Source, calibrations: Sequence[dict[str, Any]], axis: Axis) -> list[dict[str, str]]:
    """The first figures: how a run changed the model, what a file of scores is worth, the verdict."""
    tiles = []
    for view in calibrations[-1:]:
        best = next((row for row in view["pairs"] if row["name"] == "calibrated"), None)
        note = f"pair accuracy {best['value']} {best['interval']}" if best else ""
        tiles.append({"label": "Calibrated score", "value": view["heading"], "note": note, "kind": view["kind"]})
    evaluations = [row for row in source.rows if row["stage"] == "eval"]
    words = {key: words for words, key in EVALUATED}
    for key in HEADLINES:
        points = [p for p in (_estimate(row, f"eval/{key}") for row in evaluations) if p]
        if points and len(tiles) < 4:
            before, after = points[0], points[-1]
            value = number(after[0]) if len(points) == 1 else f"{number(before[0])} → {number(after[0])}"
            note = f"95\u00a0% interval {_interval_words(after[1], after[2])}" if after[1] is not None else ""
            tiles.append({"label": words[key], "value": value, "note": note, "kind": ""})
    if source.rows and any(name not in ("SFT",) for name, _, _ in axis.stages):
        fired = len(axis.guards)
        value = "none fired" if not fired else f"fired {fired} time{'s' * (fired > 1)}"
        note = axis.guards[-1][1].partition(": ")[2] if fired else _guard_setting(source.config)
        tiles.append({"label": "Guards", "value": value, "note": note, "kind": "warning" if fired else ""})
    if source.completions and not source.rows:
        tiles += _completion_tiles(source.completions)
    return tiles


def model_name(source: Source) -> str | None:
    """The model of a run or of a calibrated score as it was named there; of an absolute path the end."""
    names = [str(score["model"]) for score in source.scores.values() if score.get("model")]
    name = names[0] if names else _setting(source.config, "model")
    return "/".join(name.split("/")[-2:]) if name and name.startswith("/") else name


def _completion_tiles(completions: Sequence[Completion]) -> list[dict[str, str]]:
    groups: dict[Any, list[Completion]] = {}
    for one in completions:
        groups.setdefault(one.group, []).append(one)
    tiles = [_tile("Completions", str(len(completions)), f"of {len(groups)} prompts")]
    known = [one for one in completions if one.correct is not None]
    if known:
        right = sum(bool(one.correct) for one in known)
        tiles.append(_tile("Right", f"{right / len(known):.3f}", f"{right} of {len(known)} completions"))
    whole = [g for g in groups.values() if len(g) > 1 and all(one.correct is not None for one in g)]
    if whole:
        scored = [[one for one in g if one.score is not None and one.valid] for g in whole]
        best = sum(bool(max(g, key=lambda one: one.score).correct) for g in scored if g)
        some = sum(any(one.correct for one in g) for g in whole)
        tiles.append(_tile("Right: best by score", f"{best / len(whole):.3f}", f"{best} of {len(whole)} prompts"))
        tiles.append(_tile("Right: any candidate", f"{some / len(whole):.3f}", f"{some} of {len(whole)} prompts"))
    return tiles


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "kind": ""}


def _weights(score: dict[str, Any]) -> list[dict[str, Any]]:
    """Weights with their intervals and scales, in the order of `features`."""
    weights, intervals = score.get("weights") or {}, score.get("weight_intervals") or {}
    names = [name for name in score.get("features") or weights if finite(weights.get(name)) is not None]
    bounds = {name: _pair(intervals.get(name)) for name in names}
    reach = max([abs(x) for name in names for x in (weights[name], *bounds[name]) if x is not None] or [1.0]) or 1.0
    return [
        {
            "name": str(name),
            "value": number(weights[name], signed=True),
            "interval": _interval_words(*bounds[name]),
            "scale": number(finite((score.get("scales") or {}).get(name))),
            "drawing": charts.interval(weights[name], *bounds[name], (-reach, reach), 0.0),
        }
        for name in names
    ]


def _pair(value: Any) -> tuple[float | None, float | None]:
    if isinstance(value, list) and len(value) == 2 and None not in (ends := [finite(x) for x in value]):
        return ends[0], ends[1]
    return None, None


def _series(rows: Iterable[dict[str, Any]], key: str, name: str) -> Series:
    found = ((row["total_steps"], _estimate(row, key)) for row in rows)
    return Series(name, [(x, *point) for x, point in found if point])


def _estimate(row: dict[str, Any], key: str) -> tuple[float, float | None, float | None] | None:
    value = finite(row.get(key))
    if value is None:
        return None
    low, high = (finite(row.get(name)) for name in _bounds(key))
    return value, low, high


def _bounds(key: str) -> tuple[str, str]:
    """The names of an estimate's interval in metrics.jsonl."""
    stem = key.removesuffix("_accuracy") if key in ("eval/preference_accuracy", "eval/answer_accuracy") else key
    return f"{stem}_low", f"{stem}_high"


def _interval_words(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{number(low)},\u00a0{number(high)}]"


def _done(row: dict[str, Any]) -> str:
    return str(row.get("done") or row.get("action") or "")


def _guard_setting(config: str | None) -> str:
    action = _setting(config, "guards")
    return "" if action is None else f"guards: {'off' if action == 'False' else action}"


def _setting(config: str | None, name: str) -> str | None:
    try:
        values = load_yaml(config or "")
    except ValueError:
        return None
    value = values.get(name) if isinstance(values, dict) else None
    return None if value is None else str(value)
